"""The reader against the gguf package's on sound files, and against lies in unsound ones."""

import os
from random import Random
import struct
import time
import tracemalloc

import gguf
from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from conftest import EXAMPLE, ROOT, share_of
import kqprefill
from kqprefill.errors import GGUFError, KqprefillError
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model
from kqprefill.text import Tokenizer


@pytest.mark.parametrize("path", [EXAMPLE, ROOT / "tests/data/gemma3-q4_k_m.gguf"], ids=lambda p: p.stem)
def test_reads_what_the_gguf_package_reads(path):
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert set(ours.metadata) == set(fields)
        for name, field in fields.items():
            value = ours.metadata[name]
            expected = field.contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert mine.shape == tuple(reversed(tensor.shape.tolist())) and mine.type == tensor.tensor_type
            assert mine.data.tobytes() == tensor.data.tobytes(), tensor.name


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def header(version=3, tensors=0, metadata=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata)


def pair(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


def tensor_info(name="t", dims=(32,), kind=0, offset=0):
    return string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def with_data(info, count=1, nbytes=4096):
    head = header(tensors=count) + info
    return head + b"\0" * (-len(head) % 32) + b"\0" * nbytes


LONG = 1 << 62
UNSOUND = {
    "empty": (b"", "too few"),
    "not GGUF": (b"GGML" + b"\0" * 40, "not a GGUF"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (header(tensors=LONG), "tensor count"),
    "more metadata than bytes": (header(metadata=LONG), "metadata count"),
    "string past the end": (header(metadata=1) + struct.pack("<Q", LONG) + b"\0" * 32, "metadata key of"),
    "value past the end": (header(metadata=1) + pair("k", 8, struct.pack("<Q", LONG)), "truncated"),
    "array past the end": (header(metadata=1) + pair("k", 9, struct.pack("<IQ", 5, LONG)), "count"),
    "string array past the end": (
        header(metadata=1) + pair("k", 9, struct.pack("<IQ", 8, 2) + string("a") + struct.pack("<Q", 99)),
        "truncated",
    ),
    "array of arrays": (header(metadata=1) + pair("k", 9, struct.pack("<IQ", 9, 1) + b"\0" * 16), "not supported"),
    "unknown value type": (header(metadata=1) + pair("k", 77, b"\0" * 8), "unknown type"),
    "key twice": (header(metadata=2) + pair("k", 4, b"\0" * 4) * 2, "twice"),
    "key not UTF-8": (header(metadata=1) + struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 16, "UTF-8"),
    "alignment 0": (header(metadata=1) + pair("general.alignment", 4, b"\0" * 4), "power of two"),
    "alignment 48": (header(metadata=1) + pair("general.alignment", 4, struct.pack("<I", 48)), "power of two"),
    "no dimensions": (with_data(tensor_info(dims=())), "0 dimensions"),
    "five dimensions": (with_data(tensor_info(dims=(1,) * 5)), "5 dimensions"),
    "dimension 0": (with_data(tensor_info(dims=(32, 0))), "dimension of 0"),
    "dimensions overflow": (with_data(tensor_info(dims=(1 << 40, 1 << 40))), "past the file's"),
    "unknown tensor type": (with_data(tensor_info(kind=9999)), "unknown ggml type"),
    "row no multiple of the block": (with_data(tensor_info(dims=(100,), kind=12)), "no multiple"),
    "offset unaligned": (with_data(tensor_info(offset=4)), "not a multiple of the alignment"),
    "offset past the end": (with_data(tensor_info(offset=1 << 40)), "truncated"),
    "data past the end": (with_data(tensor_info(dims=(32, 1000))), "truncated"),
    "tensor twice": (with_data(tensor_info() * 2, count=2), "twice"),
    "tensors overlap": (
        with_data(tensor_info(dims=(64,)) + tensor_info("u", offset=224), count=2),
        "tensor u begins at byte 32",
    ),
    "tensors at one place": (with_data(tensor_info() + tensor_info("u"), count=2), "within tensor t"),
    "alignment true": (
        header(metadata=1) + pair("general.alignment", 7, b"\1"),
        "alignment is True, not an integer of 0",
    ),
    "alignment an array": (
        header(metadata=1) + pair("general.alignment", 9, struct.pack("<IQI", 4, 1, 32)),
        "alignment is an array of 1 uint32, not an integer of 0",
    ),
    "negative split count": (header(metadata=1) + pair("split.count", 5, struct.pack("<i", -2)), "split.count is -2"),
    "more files than names": (
        header(metadata=1) + pair("split.count", 4, struct.pack("<I", 20000)),
        "must be named",
    ),
    "split count a text": (header(metadata=1) + pair("split.count", 8, string("2")), "split.count is '2'"),
    "split count an array": (
        header(metadata=1) + pair("split.count", 9, struct.pack("<IQI", 4, 1, 2)),
        "an array of 1",
    ),
    "negative split number": (header(metadata=1) + pair("split.no", 5, struct.pack("<i", -1)), "split.no is -1"),
    "name too long": (with_data(tensor_info(name="n" * 64)), "tensor name of 64"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_refuses_unsound_files_in_one_line(case, tmp_path):
    path = tmp_path / "model.gguf"
    content, complaint = UNSOUND[case]
    path.write_bytes(content)
    with pytest.raises(GGUFError) as refusal:
        GGUFFile(path)
    message = str(refusal.value)
    assert complaint in message and message.startswith(str(path)) and "\n" not in message


@pytest.mark.parametrize("size", [1, 10, 23, 24, 100, 2000, 5000])
def test_refuses_every_truncation(size, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(EXAMPLE.read_bytes()[:size])
    with pytest.raises(GGUFError):
        GGUFFile(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError, match=str(path)):
            GGUFFile(path)


def test_a_pipe_is_no_model(tmp_path):
    """It would be waited for, for ever."""
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", "/dev/null", "/dev/zero"):
        with pytest.raises(GGUFError, match="a pipe or a device"):
            GGUFFile(path)


def test_strings_of_all_lengths_are_stepped_over(tmp_path):
    lengths = [0, 1, 255, 256, 257, 3, 70000, 2, *range(500), 300, 300, 300]
    strings = ["x" * n for n in lengths]
    body = pair("list", 9, struct.pack("<IQ", 8, len(strings)) + b"".join(map(string, strings)))
    path = tmp_path / "model.gguf"
    path.write_bytes(header(metadata=2) + body + pair("after", 4, struct.pack("<I", 7)))
    with GGUFFile(path) as file:
        assert file.metadata["after"] == 7
        assert file.metadata.array_length("list") == len(strings)
        assert file.metadata["list"] == strings


def test_version_2_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(header(version=2, metadata=1) + pair("k", 8, string("v")))
    with GGUFFile(path) as file:
        assert file.version == 2 and dict(file.metadata) == {"k": "v"}


FUZZED = [EXAMPLE, *(ROOT / "tests/data" / f"{name}.gguf" for name in ("phi3-q4_k_m", "gemma3-q4_k_m", "granite-q4_k"))]


@pytest.mark.parametrize("count", [500, pytest.param(share_of(8_000), marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", FUZZED, ids=lambda path: path.stem)
def test_mutated_files_are_read_or_refused(base, count, tmp_path, rng):
    """Random damage to the header and the tensor table, `count` times: the model opens, or one of our errors says why
    not, in one line, at once, and with no more memory than the file's size explains."""
    raw, path = base.read_bytes(), tmp_path / "model.gguf"
    with GGUFFile(base) as file:
        end = min(tensor.offset for tensor in file.tensors.values())  # of the header
    tracemalloc.start()
    for seed in rng.integers(0, 1 << 62, count).tolist():
        random = Random(seed)
        damaged = bytearray(raw[: random.choice([len(raw), random.randrange(len(raw)), random.randrange(end)])])
        for _ in range(random.choice([1, 2, 5, 20])):
            at, kind = random.randrange(min(end, len(damaged)) or 1), random.randrange(5)
            if kind == 0:
                damaged[at : at + 1] = random.randbytes(1)
            elif kind == 1:
                damaged[at : at + 8] = random.choice([b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little")])
            elif kind == 2:
                del damaged[at : at + random.randrange(1, 16)]
            elif kind == 3:
                damaged[at:at] = random.randbytes(random.randrange(1, 16))
            else:  # a key or a tensor that is another's
                at, other = random.randrange(max(1, end - 24)), random.randrange(max(1, end - 24))
                damaged[at : at + 24] = damaged[other : other + 24]
        path.write_bytes(damaged)
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
        try:
            with GGUFFile(path) as file:
                dict(file.metadata)
                read_model(file)
                Tokenizer(file.metadata, path)
        except KqprefillError as error:
            assert "\n" not in str(error), seed
        assert time.perf_counter() - start < 1, seed
        # Decoded metadata are Python's objects: at most some dozens of bytes for one of the file.
        assert tracemalloc.get_traced_memory()[1] - before < 32 * len(damaged) + (4 << 20), seed
    tracemalloc.stop()


@pytest.fixture
def split(tmp_path):
    """The example in four files."""
    with GGUFFile(EXAMPLE) as file:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3", split_max_tensors=-(-len(file.tensors) // 4))
        for key, value in file.metadata.items():
            if key == "general.architecture":
                continue
            add = {float: writer.add_float32, str: writer.add_string, int: writer.add_uint32}.get(type(value))
            add(key, value) if add else writer.add_array(key, np.asarray(value).tolist())
        for tensor in file.tensors.values():
            data = np.array(tensor.data)
            data = data.view(np.float32) if tensor.type == GGML.F32 else data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    files = sorted(tmp_path.glob("model-*-of-00004.gguf"))
    assert len(files) == 4
    return files


def test_the_first_of_a_split_model_opens_all(split):
    with GGUFFile(EXAMPLE) as whole, GGUFFile(split[0]) as parts:
        assert set(parts.tensors) == set(whole.tensors)
        assert all(np.array_equal(parts.tensors[name].data, t.data) for name, t in whole.tensors.items())
    with kqprefill.load(EXAMPLE, backend="cpu") as one, kqprefill.load(split[0], backend="cpu") as many:
        assert np.array_equal(
            one.prefill([1, 2, 3], logits="last").logits, many.prefill([1, 2, 3], logits="last").logits
        )


@pytest.mark.parametrize(
    "key,value,complaint",
    [
        ("split.count", 5, "split.count is 5, but 4 in the first file"),
        ("split.count", 0, "file 1 .*where 1 is wanted|split.count is 0"),
        ("split.tensors.count", 7, "split.tensors.count is 7, but"),
        ("general.architecture", "llama", "general.architecture is 'llama', but 'qwen3' in the first file"),
        ("qwen3.block_count", 9, "qwen3.block_count is 9, but 2 in the first file"),
    ],
)
def test_parts_of_a_split_model_that_contradict_the_first(key, value, complaint, split):
    with GGUFFile(split[1], 1) as part:
        values = {**part.metadata, key: value}
        body = b"".join(
            pair(k, 8, string(v)) if isinstance(v, str) else pair(k, 4, struct.pack("<I", v)) for k, v in values.items()
        )
        infos = b"".join(
            tensor_info(t.name, t.shape[::-1], int(t.type), t.offset - min(u.offset for u in part.tensors.values()))
            for t in part.tensors.values()
        )
        data = bytes(part.bytes[min(t.offset for t in part.tensors.values()) :])
    head = header(tensors=infos.count(b"weight"), metadata=len(values)) + body + infos
    split[1].write_bytes(head + b"\0" * (-len(head) % 32) + data)
    with pytest.raises(GGUFError, match=complaint):
        GGUFFile(split[0])


def test_split_models_that_are_not_whole(split, tmp_path):
    with pytest.raises(kqprefill.GGUFError, match=r"name the first, .*model-00001-of-00004\.gguf"):
        GGUFFile(split[2])
    renamed = split[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(kqprefill.GGUFError, match=r"must be named .*-00001-of-00004\.gguf"):
        GGUFFile(renamed)
    renamed.rename(split[0])
    third = split[2].rename(tmp_path / "elsewhere")
    with pytest.raises(kqprefill.GGUFError, match=r"model-00003-of-00004\.gguf: No such file"):
        GGUFFile(split[0])
    split[2].write_bytes(split[1].read_bytes())
    with pytest.raises(kqprefill.GGUFError, match=r"file 1 .* where 2 is wanted"):
        GGUFFile(split[0])
    split[2].write_bytes(third.read_bytes()[:-50000])
    with pytest.raises(kqprefill.GGUFError, match=r"model-00003-of-00004\.gguf: tensor .*truncated"):
        GGUFFile(split[0])
