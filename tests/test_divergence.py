"""`perplexity --save-logits` and `kld`: llama-perplexity's file, and its statistics."""

import json
import os
import re
import shutil
import struct
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import BACKENDS, ROOT, kl_divergence, log_softmax
from kqprefill.backends.cpu.ops import CpuOps
from kqprefill.cli.kld import _lines
from kqprefill.core import Batch, Segment, Targets
from kqprefill.engine import windows as windows_module
from kqprefill.engine.divergence import divergence
from kqprefill.engine.logits_file import LogitsFile, file_size, save_logits
from kqprefill.engine.model import open_model
from kqprefill.engine.perplexity import perplexity
from kqprefill.engine.windows import Windows, batches_of, window_logits
from kqprefill.errors import BackendError, InputError
from kqprefill.gguf.types import GGML
from kqprefill.synthetic import SyntheticFile, write_gguf
from kqprefill.synthetic.shapes import SHAPES
from test_cli import kq

# What llama-perplexity (of llama-cpp-python 0.3.36; -t 1 -c 512 -fa off -ctk f32 -ctv f32, on a CPU) prints of
# `files()` over `TEXT`: of the second against the first's file.
PRINTED = ROOT / "tests" / "data" / "kl_divergence.txt"
TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(8192))
NUMBER = re.compile(r"-?\d+\.\d+")
CPU = ["--backend", "cpu"]


def files():
    """A small model, and the same one with its positions turned faster, in F32."""
    both = [SyntheticFile(SHAPES["tiny"], lambda *_: GGML.F32, "windows") for _ in range(2)]
    both[1].metadata["qwen3.rope.freq_base"] = 1e4
    return both


@pytest.fixture(scope="module")
def models():
    base, model = (open_model(file, "cpu") for file in files())
    with base, model:
        yield base, model


def cut(models, context=64, most=5, text=TEXT):
    return Windows.of(models[0].tokenize(text), context, most, None, models)


def saved(model, windows, path):
    with open(path, "wb") as file:
        found = save_logits(model, windows, file)
    return found


def assert_printed(lines, printed, steps=2, relative=3e-8, difference=0.0):
    """That lines have the words of others, and their numbers to so many steps of the last digit, or so far; the
    difference of two perplexities may be off by `difference`."""
    printed = [line for line in printed if line]
    lines = [line for line in lines if line]
    assert [NUMBER.sub("", line).split() for line in lines] == [NUMBER.sub("", line).split() for line in printed]
    for line, other in zip(lines, printed):
        least = difference if line.startswith("Mean PPL(Q)-PPL(base)") else 0.0
        for mine, theirs in zip(NUMBER.findall(line), NUMBER.findall(other)):
            step = 10.0 ** -len(theirs.partition(".")[2])
            allowed = max(steps * step, relative * abs(float(theirs)), least)
            assert abs(float(mine) - float(theirs)) <= allowed * 1.01, (line, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_statistics_are_llama_cpps(backend, tmp_path):
    """From a file and from the other model beside this one: where no token is 16 nats below another, they are alike."""
    base, model = (open_model(file, backend) for file in files())
    printed = PRINTED.read_text(encoding="utf-8").splitlines()
    # A GPU multiplies halves: a perplexity of 277 may be off by 0.028, and 0.003 is 1e-5 of it.
    steps, relative, difference = (2, 3e-8, 0.0) if backend == "cpu" else (1000, 1e-4, 0.003)
    with base, model:
        windows = Windows.of(base.tokenize(TEXT), 512, None, None, [base, model])
        found = saved(base, windows, tmp_path / "base")
        assert found.value == pytest.approx(276.7518, rel=1e-6 if backend == "cpu" else 1e-4)
        from_file = _lines(divergence(model, LogitsFile(str(tmp_path / "base")), windows))
        assert_printed(from_file, printed, steps, relative, difference)
        assert_printed(_lines(divergence(model, base, windows)), printed, max(steps, 8), relative, difference)


def test_the_file_has_llama_cpps_layout(models, tmp_path):
    base = models[0]
    windows = Windows(cut(models, most=3).tokens, bos=5)  # a BOS is run, and not written
    measured = saved(base, windows, tmp_path / "base")
    data = (tmp_path / "base").read_bytes()
    count, scored, vocab = 3, 31, base.config.vocab_size
    assert len(data) == file_size(windows, vocab)
    assert struct.unpack("<8s3i", data[:20]) == (b"_logits_", 64, vocab, count)
    tokens = np.frombuffer(data, "<i4", count * 64, 20)
    assert np.array_equal(tokens, base.tokenize(TEXT)[: 3 * 64])
    rows = np.frombuffer(data[20 + 4 * count * 64 :], "<u2").reshape(count * scored, 4 + vocab + vocab % 2)
    scale, least = rows[:, :4].copy().view("<f4").T
    told = scale[:, None] * rows[:, 4 : 4 + vocab] + least[:, None]
    surprisal = []
    for i in range(count):
        logits = base.prefill([5, *tokens[i * 64 + 1 : (i + 1) * 64 - 1].tolist()], logits="all").logits
        exact = log_softmax(logits)[32:]
        assert np.abs(told[i * scored : (i + 1) * scored] - exact).max() < scale.max() / 2 + 1e-5
        surprisal.append(-exact[np.arange(scored), tokens[i * 64 + 33 : (i + 1) * 64]])
    assert measured.value == pytest.approx(np.exp(np.mean(surprisal)), rel=1e-6)
    own = perplexity(base, tokens.tolist(), 64, bos=5)
    assert (measured.n_tokens, measured.windows) == (own.n_tokens, own.windows)
    assert (measured.value, measured.error) == (pytest.approx(own.value, rel=1e-6), pytest.approx(own.error, rel=1e-5))


def test_the_16_nats_of_the_file(tmp_path):
    """What lies lower is told as 16 below the likeliest; rows of equal logits, and odd vocabularies, are rows too."""
    from kqprefill.engine.logits_file import _pack

    logits = np.array([[0, -3, -20, -40, 2], [7, 7, 7, 7, 7]], np.float32)
    words, surprisal = _pack(logits, np.array([3, 1], np.int32))
    assert words.shape == (2, 10) and words[0, 4:].tolist() == [57343, 45055, 0, 0, 65535, 0] and not words[1, 4:].any()
    scale, least = words[:, :4].copy().view("<f4").T
    exact = log_softmax(logits)
    assert scale.tolist() == [pytest.approx(16 / 65535), 0]
    assert least.tolist() == pytest.approx([exact[0].max() - 16, exact[1, 0]], rel=1e-6)
    assert surprisal.tolist() == pytest.approx([-exact[0, 3], -exact[1, 1]], rel=1e-6)


def test_against_another_model_has_no_floor(models):
    """The divergences are those of exact arithmetic, and of a model with itself none at all."""
    base, model = models
    windows = cut(models)
    found = divergence(model, base, windows)
    mean, logprobs = [], []
    for i in range(len(windows)):
        own, other = (one.prefill(windows.window(i)[:-1], logits="all").logits[32:] for one in (model, base))
        mean.append(kl_divergence(other, own))
        at = np.arange(windows.scored), windows.tokens[i, 33:]
        logprobs.append([log_softmax(own)[at], log_softmax(other)[at]])
    own, other = np.concatenate(logprobs, axis=-1)
    assert found.kld.value == pytest.approx(np.mean(mean), abs=1e-7)
    assert found.log_ratio.value == pytest.approx((other - own).mean(), abs=1e-6)
    assert found.change.value == pytest.approx((np.exp(own) - np.exp(other)).mean(), abs=1e-7)
    assert (found.n_tokens, found.windows) == (5 * 31, 5) and len(found.klds) == 5 * 31
    itself = divergence(model, model, windows)
    assert (itself.kld.value, itself.kld_at[1.0], itself.change_rms.value, itself.same_top.value) == (0, 0, 0, 1)


def test_batches_change_nothing(models, tmp_path, monkeypatch):
    base, model = models
    windows = cut(models)
    found = divergence(model, base, windows)
    heard = []
    alone = divergence(model, base, windows, batch_tokens=1, progress=lambda *told: heard.append(told))
    assert [part.stop - part.start for part in batches_of(windows, models, 1)] == [1] * 5
    assert len(batches_of(windows, models, None)) == 1
    assert np.array_equal(found.klds, alone.klds) and found.kld == alone.kld
    layers = model.config.block_count
    assert [told for told in heard if told[0] == "windows"][-1] == ("windows", 5 * layers * 2, 5 * layers * 2)
    # The logits of both models have room for the windows of a batch.
    monkeypatch.setattr(windows_module, "_LOGITS_BYTES", 2 * 2 * 4 * windows.scored * base.config.vocab_size)
    assert [part.stop - part.start for part in batches_of(windows, models, None)] == [2, 2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_rows(backend, rng):
    """Those after the targets' rows, whatever else is in the batch."""
    with open_model(files()[0], backend) as model:
        vocab = model.config.vocab_size
        ids = rng.integers(0, vocab, 50).astype(np.int32)
        rows = np.array([3, 19, 20, 49], np.int32)
        segments = (Segment(0, 20), Segment(20, 30))
        batch = Batch(ids, segments=segments, targets=Targets(rows, np.zeros(4, np.int32)))
        pending, _ = model.backend.run(model.family, batch, None, "rows", lambda *_: None)
        found = pending().logits
        first, second = (model.prefill(part, logits="all").logits for part in (ids[:20], ids[20:]))
        expected = np.stack([first[3], first[19], second[0], second[29]])
        assert found.shape == (4, vocab) and np.allclose(found, expected, atol=0 if backend == "cuda" else 1e-4)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_logits_of_rows_are_rehearsed(capability):
    """Without a GPU: what a batch launches whose targets' logits are wanted."""
    from kqprefill.backends.cuda.bounds import H100
    from kqprefill.backends.cuda.kernel_set import kernel_set_of
    from kqprefill.backends.cuda.rehearsal import rehearse
    from kqprefill.models import read_model

    ids, rows = np.zeros(128, np.int32), np.arange(32, 63, dtype=np.int32)
    batch = Batch(ids, segments=(Segment(0, 64), Segment(64, 64)), targets=Targets(rows, rows))
    family, kernels = read_model(files()[0]), kernel_set_of(capability)
    of_rows, of_all = (rehearse(family, H100, kernels, batch, logits) for logits in ("rows", "all"))
    assert set(of_rows.programs) == set(of_all.programs) and 0 < of_rows.work_bytes < of_all.work_bytes


def test_logits_that_are_not_finite(models, monkeypatch):
    base = models[0]
    windows = cut(models, most=2)
    norm = base.family.output_norm.tensor
    broken = np.full(norm.shape[::-1], np.nan, np.float32)
    monkeypatch.setattr(
        "kqprefill.backends.cpu.ops.vector_of", lambda tensor: broken if tensor is norm else _real(tensor)
    )
    with pytest.raises(BackendError, match="token 33 of the text is not finite"):
        window_logits(base, windows, slice(0, 2))


def test_the_last_row_of_a_batch_is_named_too(models, monkeypatch):
    """The row from which a prompt's greedy token would come."""
    windows = cut(models, most=2)
    head = CpuOps.head

    def broken(self, x, *args, **options):
        x[-1] = np.nan
        return head(self, x, *args, **options)

    monkeypatch.setattr(CpuOps, "head", broken)
    with pytest.raises(BackendError, match="token 127 of the text is not finite"):
        window_logits(models[0], windows, slice(0, 2))
    with pytest.raises(BackendError, match="the logits of position 2 hold NaN"):
        models[0].prefill([1, 2, 3])


def _real(tensor):
    from kqprefill.backends.cpu.functions import vector_of

    return vector_of(tensor)


# The commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    paths = [str(tmp_path / name) for name in ("base.gguf", "model.gguf")]
    for file, path in zip(files(), paths):
        write_gguf(file, path)
    (tmp_path / "text").write_text(TEXT[:2000])
    return *paths, str(tmp_path / "text")


def test_the_commands(pair, tmp_path):
    base, model, text = pair
    options = ["-f", text, "-c", 64, *CPU]
    plain = kq("perplexity", base, *options)
    done = kq("perplexity", base, *options, "--save-logits", tmp_path / "logits")
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", plain.stdout)
    from_file = kq("kld", model, "--base", tmp_path / "logits", *CPU)
    beside = kq("kld", model, "--against", base, *options)
    assert (from_file.returncode, from_file.stderr, beside.returncode, beside.stderr) == (0, b"", 0, b"")
    assert_printed(from_file.stdout.decode().splitlines(), beside.stdout.decode().splitlines(), 40)
    found = json.loads(kq("kld", model, "--base", tmp_path / "logits", "--json", "--chunks", 4, *CPU).stdout)
    assert (found["windows"], found["n_tokens"], found["context"], found["model"]) == (4, 4 * 31, 64, model)
    assert (
        found["kld"] == pytest.approx(0.0118, abs=3e-3) and found["kld_quantiles"]["0.5"] < found["kld_quantiles"]["1"]
    )
    again = kq("perplexity", base, *options, "--save-logits", tmp_path / "logits")
    assert again.returncode == 2 and b"it exists; --force replaces it" in again.stderr
    assert kq("perplexity", base, *options, "--save-logits", base, "--force").returncode == 2


def test_the_plot_of_divergences(pair, tmp_path):
    pytest.importorskip("matplotlib")
    base, model, text = pair
    for other in (base, model):  # the second has no divergence to draw
        picture = tmp_path / "spread.png"
        done = kq("kld", model, "--against", other, "-f", text, "-c", 64, "--plot", picture, "--force", *CPU)
        assert (done.returncode, done.stderr) == (0, b"") and picture.read_bytes().startswith(b"\x89PNG")


def test_what_kld_refuses(pair, tmp_path):
    base, model, text = pair
    logits = tmp_path / "logits"
    assert kq("perplexity", base, "-f", text, "-c", 64, *CPU, "--save-logits", logits).returncode == 0
    data = logits.read_bytes()
    (tmp_path / "short").write_bytes(data[:-1])
    (tmp_path / "long").write_bytes(data + b"\0")
    (tmp_path / "wrong").write_bytes(data[:8] + struct.pack("<3i", 64, 100, -1) + data[20:])
    (tmp_path / "nan").write_bytes(data[: -(2 * 260 - 2)] + b"\xff\xff" * 259)
    # Of another vocabulary.
    (tmp_path / "other").write_bytes(struct.pack("<8s3i", b"_logits_", 4, 10, 1) + bytes(4 * 4 + 2 * 14))
    wider = (struct.pack("<8s3i", b"_logits_", 4, 900, 1), struct.pack("<4i", 1, 899, 2, 3), bytes(2 * 904))
    (tmp_path / "wider").write_bytes(b"".join(wider))  # and of ids that the model has not
    cases = [
        ([], 2, "--base FILE or as --against MODEL"),
        (["--base", tmp_path / "wider"], 2, "has a vocabulary of 900 tokens"),
        (["--base", "a", "--against", "b"], 2, "--base FILE or as --against MODEL"),
        (["--base", logits, "-f", text, "-c", 64], 2, "--file and --context: the file of --base has its text"),
        (["--against", base], 2, "--file FILE or as --tokens IDS"),
        (["--against", "absent.gguf", "-f", text], 1, "absent.gguf"),
        (["--base", "absent"], 1, "absent: No such file"),
        (["--base", text], 1, "no file of log-probabilities"),
        (["--base", tmp_path / "short"], 1, "it was cut short"),
        (["--base", tmp_path / "long"], 1, "it is damaged"),
        (["--base", tmp_path / "wrong"], 1, "its header says -1 windows"),
        (["--base", tmp_path / "nan"], 1, "a scale among its log-probabilities is not finite"),
        (["--base", tmp_path / "other"], 2, "has a vocabulary of 10 tokens"),
        (["--base", logits, "--plot", logits, "--force"], 2, ""),
    ]
    for arguments, status, complaint in cases:
        done = kq("kld", model, *arguments, *CPU)
        told = done.stderr.decode()
        assert done.returncode == status and complaint in told and "Traceback" not in told, (arguments, told)


def test_a_disk_without_room(pair, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from kqprefill.cli import perplexity as command

    monkeypatch.setattr(command, "free_room", lambda path: 1000)
    done = CliRunner().invoke(
        command.perplexity, [pair[0], "-f", pair[2], "-c", "64", *CPU, "--save-logits", str(tmp_path / "x")]
    )
    assert isinstance(done.exception, InputError) and "1000 B are free there" in str(done.exception)
    assert not (tmp_path / "x").exists()


def test_memory_of_a_device_is_shared_out(monkeypatch):
    """By the size of the weights, the larger model first; what it can do without is the other's."""
    from kqprefill.cli.kld import _open_both
    from kqprefill.cli.run_options import RunOptions

    class Fake:
        def __init__(self, nbytes):
            self.tensors = {"x": type("T", (), {"nbytes": nbytes})}

    class FakeBackend:
        name = "cuda"

        def __init__(self, room, nbytes):
            self.plans, self.least = (SimpleNamespace(nbytes=room),), min(room, nbytes + 5)

        def take_least(self):
            self.plans = (SimpleNamespace(nbytes=self.least),)

    asked = []

    def on(vram):
        return RunOptions("cuda", "0", "auto", vram, "exact", quiet=False, verbose=False)

    def open_fake(file, on):
        nbytes = file.tensors["x"].nbytes
        asked.append((nbytes, on.vram))
        return SimpleNamespace(file=file, backend=FakeBackend(int(on.vram), nbytes))

    small, large = Fake(30), Fake(90)
    assert [m.file for m in _open_both(small, large, on(None), 200, open_fake)] == [small, large]
    assert [m.file for m in _open_both(large, small, on("1"), 100, open_fake)] == [large, small]
    assert asked == [(90, "150"), (30, "105"), (90, "75"), (30, "25")]


@pytest.mark.slow
def test_each_reads_the_others_file(pair, tmp_path):
    """llama-perplexity itself, $KQPREFILL_LLAMA_PERPLEXITY or on the path."""
    tool = os.environ.get("KQPREFILL_LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")
    if tool is None:
        pytest.skip("needs llama-perplexity: put it on the path, or set KQPREFILL_LLAMA_PERPLEXITY")
    base, model, text = pair
    options = ["-c", "64", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    subprocess.run([tool, "-m", base, "-f", text, *options, "--kl-divergence-base", theirs], capture_output=True)
    assert kq("perplexity", base, "-f", text, "-c", 64, *CPU, "--save-logits", ours).returncode == 0
    (scale, least, numbers), (other_scale, other_least, others) = (
        LogitsFile(str(path)).rows(slice(None)) for path in (theirs, ours)
    )
    assert np.abs(scale * numbers + least - other_scale * others - other_least).max() < 1e-4
    for path in (theirs, ours):
        for _ in range(20):  # it loses the tail of what it prints, at random
            told = subprocess.run(
                [tool, "-m", model, *options, "--kl-divergence", "--kl-divergence-base", path], capture_output=True
            ).stdout.decode()
            if "Same top p:" in told:
                break
        printed = told[told.index("====== Perplexity") :].splitlines()
        assert_printed(kq("kld", model, "--base", path, *CPU).stdout.decode().splitlines(), printed)
