"""Model files with faults, for the fuzzing tier: a small sound model of any family, then damage of many kinds.

Everything comes from a random.Random, so that its seed gives the same file again.
"""

from dataclasses import replace
from functools import cache
from random import Random
import struct

import numpy as np

from conftest import EXAMPLE, ROOT
from kqprefill.gguf import GGUFFile
from kqprefill.gguf.dequantize import SUPPORTED
from kqprefill.gguf.types import GGML
from kqprefill.gguf.vocabulary import byte_pieces
from kqprefill.models import FAMILIES
from kqprefill.synthetic import Shape, SyntheticFile
from small_models import EXPERTS, more_metadata

# GGUF's types of values, by NumPy's names of their dtypes or Python's of their types.
TYPES = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7, "str": 8}
TYPES |= {"uint64": 10, "int64": 11, "float64": 12}
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ARRAY = 9

EVIL = "\x1b]0;evil\x07\x9b7777m\u202e\x08\r\n\x1b[2J"
TEXTS = ["", " ", "a", EVIL, "\u2581", "é", "😀", "<s>", "llama", "gpt2", "yarn", "linear", "none", "x" * 300, "\ufeff"]
INTEGERS = [0, 1, 2, 3, 7, 8, 64, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -2, -(2**31)]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-38,
    1e38,
    1e308,
    5e-324,
    1e-310,
    float("nan"),
    float("inf"),
    -float("inf"),
]
PRE = "default gpt-2 llama-bpe qwen2 tekken deepseek-v3 falcon starcoder".split()
YARN = "type factor attn_factor original_context_length yarn_log_multiplier yarn_beta_fast yarn_beta_slow".split()
KEYS = """split.count split.no split.tensors.count general.alignment general.name ARCH.vocab_size ARCH.rope.freq_base
ARCH.rope.dimension_count ARCH.attention.key_length ARCH.attention.sliding_window ARCH.attention.sliding_window_pattern
ARCH.rope.freq_base_swa ARCH.attn_logit_softcapping ARCH.final_logit_softcapping ARCH.attention.scale ARCH.logit_scale
ARCH.embedding_scale ARCH.residual_scale ARCH.attention.temperature_scale ARCH.expert_count ARCH.expert_used_count
ARCH.expert_shared_feed_forward_length ARCH.expert_shared_count ARCH.expert_gating_func ARCH.expert_weights_scale
ARCH.expert_weights_norm ARCH.expert_group_count ARCH.expert_group_used_count ARCH.leading_dense_block_count
ARCH.nextn_predict_layers ARCH.full_attention_interval ARCH.attention.recurrent_layers ARCH.rope.dimension_sections
ARCH.ssm.conv_kernel ARCH.ssm.state_size ARCH.ssm.group_count ARCH.ssm.time_step_rank ARCH.ssm.inner_size
ARCH.attention.kv_lora_rank ARCH.attention.q_lora_rank ARCH.attention.key_length_mla ARCH.attention.value_length_mla
ARCH.attention.temperature_length ARCH.rope.scaling.yarn_log_multiplier ARCH.rope.scaling.attn_factor
ARCH.attention.key_length_swa ARCH.attention.value_length_swa ARCH.rope.dimension_count_swa
ARCH.attention.shared_kv_layers ARCH.embedding_length_per_layer_input ARCH.attention.head_count_kv
tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix tokenizer.ggml.pre
tokenizer.ggml.eos_token_id tokenizer.chat_template""".split()
SMALL_TYPES = [t for t in SUPPORTED if t.name in "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL MXFP4".split()]
RECORDED = [EXAMPLE, *(ROOT / "tests/data").glob("*.gguf")]  # of llama.cpp's making, every format among them


class Draft:
    """A file that is not written yet.

    metadata: key -> (type, value), a value of type ARRAY being (type, values). tensors: [name, dimensions as GGUF
    orders them, type, data, offset or None for its place in the row].
    """

    def __init__(self, metadata, tensors):
        self.metadata = {key: typed(value) for key, value in metadata.items()}
        self.tensors = [
            [t.name, list(reversed(t.shape)), int(t.type), bytearray(t.data.tobytes()), None] for t in tensors.values()
        ]

    def encode(self, alignment=32):
        infos, data = [], bytearray()
        for name, dims, kind, content, offset in self.tensors:
            data += bytes(-len(data) % alignment)
            place = len(data) if offset is None else offset
            infos.append(string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place % 2**64))
            data += content
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        head += b"".join(
            string(key) + struct.pack("<I", kind) + value_of(kind, value)
            for key, (kind, value) in self.metadata.items()
        )
        head += b"".join(infos)
        return bytearray(head + bytes(-len(head) % alignment) + data), len(head)


def string(text):
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def typed(value):
    """(type, value) as GGUF has it."""
    if isinstance(value, np.ndarray):
        return ARRAY, (TYPES[value.dtype.name], value.tolist())
    if isinstance(value, list):
        return ARRAY, typed_array(value)
    name = type(value).__name__
    return TYPES[{"int": "uint32", "float": "float32"}.get(name, name)], value


def typed_array(values):
    name = type(values[0]).__name__ if values else "int"
    return TYPES[{"int": "int32", "float": "float32"}.get(name, name)], values


def value_of(kind, value):
    """A value's bytes; a number that its type does not hold loses its high bits, or becomes infinite."""
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(value_of(element, v) for v in values)
    if kind == TYPES["str"]:
        return string(value)
    if kind == TYPES["bool"]:
        return bytes([bool(value)])
    if kind in (6, 12):
        with np.errstate(all="ignore"):
            return np.array(value).astype(np.float32 if kind == 6 else np.float64).tobytes()
    return (int(value) % 2 ** (8 * struct.calcsize(CODES[kind]))).to_bytes(struct.calcsize(CODES[kind]), "little")


@cache
def base_of(architecture, kind):
    """A small sound model of a family, its matrices of that type."""
    shape = Shape(architecture, 2, 32, 4, 2, 8, 32, 288, 64, 1e4, window=8, more=more_metadata(architecture))
    if architecture in EXPERTS:
        shape = replace(shape, experts=4, used=2)
    return SyntheticFile(shape, lambda name, layer: kind, architecture)


def vocabulary(random, size):
    """Metadata of a small tokenizer of either kind."""
    if random.random() < 0.5:
        pieces = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            "a",
            "b",
            "ab",
            "\u2581a",
            "é",
        ]
        pieces += [f"w{i}" for i in range(size - len(pieces))]
        values = {"model": "llama", "tokens": pieces, "bos_token_id": 1, "eos_token_id": 2}
        values["scores"] = np.array([-float(i) for i in range(size)], np.float32)
        values["token_type"] = np.array([2, 3, 3, *[6] * 256, *[1] * (size - 259)], np.int32)
    else:
        pieces = [*byte_pieces(), "he", "ll", "hell", "\u0120he", "<|end|>", "<s>"]
        pieces += [f"w{i}" for i in range(size - len(pieces))]
        values = {
            "model": "gpt2",
            "pre": random.choice(PRE),
            "tokens": pieces,
            "bos_token_id": 261,
            "eos_token_id": 260,
        }
        values["merges"] = ["h e", "l l", "he ll", "\u0120 he"] if random.random() < 0.8 else ["no merge"]
        values["token_type"] = np.array([*[1] * 260, 3, 4, *[1] * (size - 262)], np.int32)
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def sound(random):
    """(Draft of a sound model, its architecture)."""
    if random.random() < 0.05:
        with GGUFFile(random.choice(RECORDED)) as file:
            return Draft(file.metadata, file.tensors), file.metadata["general.architecture"]
    architecture = random.choice(list(FAMILIES))
    base = base_of(architecture, random.choice(SMALL_TYPES))
    return Draft({**base.metadata, **vocabulary(random, 288)}, base.tensors), architecture


def any_value(random):
    """(type, value) of any kind."""
    kind = random.choice([*TYPES.values(), ARRAY, ARRAY])
    if kind == ARRAY:
        element = random.choice(list(TYPES.values()))
        values = [of_type(random, element)] * random.choice([0, 1, 2, 3, 288])
        return ARRAY, (element, values)
    return kind, of_type(random, kind)


def of_type(random, kind):
    if kind == TYPES["str"]:
        return random.choice(TEXTS)
    return random.choice(FLOATS) if kind in (6, 12) else random.choice(INTEGERS)


def other_value(draft, architecture, random):
    """A key has a value of any kind, or is gone, or is one more."""
    key = random.choice([*draft.metadata, *KEYS])
    if random.random() < 0.1:
        draft.metadata.pop(key, None)
    else:
        draft.metadata[key.replace("ARCH", architecture)] = any_value(random)


def other_number(draft, architecture, random):
    """A number becomes another one of the same type."""
    keys = [key for key, (kind, _) in draft.metadata.items() if kind in CODES and kind != 7]
    if keys:
        key = random.choice(keys)
        kind, value = draft.metadata[key]
        finite = value == value and abs(value) < 1e300
        near = (
            [value + 1, value - 1, 2 * value, value / 2]
            if kind in (6, 12)
            else [value + 1, value - 1, 2 * value, value // 2]
        )
        draft.metadata[key] = kind, random.choice(near if finite and random.random() < 0.6 else [of_type(random, kind)])


def other_rotation(draft, architecture, random):
    """YaRN, or another scaling, with numbers of all sizes."""
    prefix = f"{architecture}.rope.scaling."
    draft.metadata[prefix + "type"] = (
        TYPES["str"],
        random.choice(["yarn", "yarn", "yarn", "linear", "none", "longrope"]),
    )
    for key in random.sample(YARN[1:], random.randrange(1, 6)):
        number = random.choice([*FLOATS, 10.0 ** random.uniform(-40, 40), 10.0 ** random.uniform(-2, 2), 1 + 2.0**-50])
        draft.metadata[prefix + key] = (
            (TYPES["uint32"], random.choice(INTEGERS)) if "length" in key else (random.choice([6, 12]), number)
        )
    if random.random() < 0.3:
        draft.metadata[f"{architecture}.rope.freq_base"] = 12, random.choice([1.0, 1 + 2.0**-50, 1e-30, 1e30, 0.5])


def other_vocabulary(draft, architecture, random):
    """Pieces, scores, kinds and merges of all sorts; arrays that are too short; another kind of vocabulary."""
    arrays = [k for k, (kind, _) in draft.metadata.items() if kind == ARRAY and k.startswith("tokenizer.")]
    if not arrays or random.random() < 0.2:
        draft.metadata["tokenizer.ggml.model"] = (
            TYPES["str"],
            random.choice(["llama", "gpt2", "bert", "none", EVIL, ""]),
        )
        return
    key = random.choice(arrays)
    element, values = draft.metadata[key][1]
    values = list(values)
    change = random.randrange(6)
    if change == 0:
        values = values[: random.randrange(len(values) + 1)]
    elif change == 1:
        values = []
    elif change == 2:
        values = [of_type(random, element)] * len(values)
    elif change == 3 and element == TYPES["str"]:
        values = [f"{EVIL}{value}" for value in values]
    else:
        for _ in range(random.choice([1, 3, 100])):
            if values:
                values[random.randrange(len(values))] = of_type(random, element)
    draft.metadata[key] = ARRAY, (element, values)


def other_table(draft, architecture, random):
    """A tensor of another shape, type, place or name; one less, one more."""
    if not draft.tensors:
        return
    tensor, other = random.choice(draft.tensors), random.choice(draft.tensors)
    change = random.randrange(8)
    if change == 0:
        tensor[1][random.randrange(len(tensor[1]))] = random.choice(
            [0, 1, 31, 32, 33, 256, 2**31, 2**40, 2**62, 2**64 - 1]
        )
    elif change == 1:
        tensor[2] = random.choice([*map(int, GGML), 255, 2**31])
    elif change == 2:
        tensor[4] = random.choice([0, 32, 33, 2**40, 2**64 - 32])
    elif change == 3:
        tensor[0] = random.choice([*TEXTS, other[0], "output.weight", "rope_freqs.weight", "blk.9999.attn_q.weight"])[
            :63
        ]
    elif change == 4:
        draft.tensors.remove(tensor)
    elif change == 5:
        draft.tensors.append(
            [
                random.choice(["rope_freqs.weight", "output.bias", "blk.0.attn_q.bias", EVIL]),
                [4],
                0,
                bytearray(16),
                None,
            ]
        )
    elif change == 6:
        tensor[1], other[1] = other[1], tensor[1]
    else:
        tensor[3], other[3] = other[3], tensor[3]


def other_weights(draft, architecture, random):
    """Data of all sorts: random, NaN, infinite, huge, 0; in a whole tensor, in one place, or in every one."""
    tensors = (
        draft.tensors
        if random.random() < 0.1
        else random.choices(draft.tensors, k=random.choice([1, 3]))
        if draft.tensors
        else []
    )
    for tensor in tensors:
        pattern = random.choice(
            [
                b"\0",
                b"\xff",
                b"\x00\x7e",
                b"\x00\x7c",
                b"\x00\xfc",
                b"\xff\x7b",
                b"\x00\x00\x80\x7f",
                b"\xff\xff\x7f\x7f",
                random.randbytes(64),
            ]
        )
        size = len(tensor[3])
        length = random.choice([2, 4, 32, size])
        at = random.randrange(max(1, size - length)) & ~3
        tensor[3][at : at + length] = (pattern * (length // len(pattern) + 1))[:length]
        del tensor[3][size:]


def other_bytes(raw, end, random):
    """Damage to the bytes of a file, whose header ends at `end`."""
    for _ in range(random.choice([1, 1, 2, 5, 20])):
        at, kind = random.randrange(max(1, min(end, len(raw)))), random.randrange(6)
        if kind == 0:
            raw[at : at + 1] = random.randbytes(1)
        elif kind == 1:
            raw[at : at + 8] = random.choice([b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little")])
        elif kind == 2:
            del raw[at : at + random.randrange(1, 16)]
        elif kind == 3:
            raw[at:at] = random.randbytes(random.randrange(1, 16))
        elif kind == 4:
            other = random.randrange(max(1, end - 24))
            raw[at : at + 24] = raw[other : other + 24]
        else:
            del raw[random.choice([at, random.randrange(len(raw) + 1)]) :]


CHANGES = [other_value, other_number, other_rotation, other_vocabulary, other_table, other_weights]
WEIGHTS = [2, 2, 2, 3, 1, 4]


def in_two(draft, random):
    """The model as a split one of two files, which may contradict each other: two Drafts."""
    cut = random.randrange(len(draft.tensors) + 1)
    second = Draft({}, {})
    draft.tensors, second.tensors = draft.tensors[:cut], draft.tensors[cut:]
    for number, part in enumerate((draft, second)):
        part.metadata["split.no"] = TYPES["uint16"], number
        part.metadata["split.count"] = TYPES["uint16"], 2
        part.metadata["split.tensors.count"] = TYPES["int32"], len(draft.tensors) + len(second.tensors)
    for _ in range(random.choice([0, 1, 1, 2])):
        part = random.choice((draft, second))
        key = random.choice(["split.no", "split.count", "split.tensors.count", *draft.metadata])
        part.metadata[key] = any_value(random) if random.random() < 0.5 else (TYPES["int32"], random.choice(INTEGERS))
    return draft, second


def damaged_files(seed):
    """({name: bytes} of a model's files, of which the first is the one to open; what was done to it) of a seed."""
    random = Random(seed)
    draft, architecture = sound(random)
    done = [architecture]
    for change in random.choices(CHANGES, WEIGHTS, k=random.choice([0, 1, 1, 1, 1, 2, 4])):
        change(draft, architecture, random)
        done.append(change.__name__)
    if random.random() < 0.03:
        done.append("in_two")
        parts = enumerate(in_two(draft, random), 1)
        return {f"model-{i:05}-of-00002.gguf": bytes(part.encode()[0]) for i, part in parts}, done
    raw, end = draft.encode()
    if len(done) == 1 or random.random() < 0.1:
        other_bytes(raw, end, random)
        done.append("other_bytes")
    return {"model.gguf": bytes(raw)}, done
