"""What a batch launches on a GPU, in words: each kernel with its block, and every argument by the name of its array.

python tests/launches.py     writes tests/data/launches/*.txt anew, which test_cuda_launches.py holds launches against
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kqprefill.backends.cuda.device.arrays import DeviceArray
from kqprefill.backends.cuda.device.signatures import signatures_of
from kqprefill.backends.cuda.device.workspace import Workspace
from kqprefill.backends.cuda.gemm.tensor_maps import TensorMaps
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.ops.context import Context
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.backends.cuda.rehearsal import LaunchRecorder, NoGpu, NoWeights, _NoDownloads, _OnesForVectors
from kqprefill.backends.cuda.weights.matrix import Matrix, matrix_of
from kqprefill.core import Batch, Segment, Targets
from kqprefill.gguf.types import GGML
from kqprefill.models import read_model
from kqprefill.synthetic import Shape, SyntheticFile

FOLDER = Path(__file__).parent / "data" / "launches"
SHARED_MEMORY = {(8, 0): 163 << 10, (9, 0): 227 << 10, (12, 0): 99 << 10}  # of a block, by capability


@dataclass(frozen=True)
class Facts:
    """What must be known of a GPU that is not here."""

    capability: tuple[int, int]
    multiprocessors: int = 132
    clock: float = 1e9
    memory_rate: float = 1e12

    @property
    def shared_memory(self):
        return SHARED_MEMORY[self.capability]

    def bus_rate(self):
        return 5e10


class CheckedGpu(NoGpu):
    """Knows which memory has been given back."""

    def __init__(self, facts):
        super().__init__(facts)
        self.freed = set()

    def allocate(self, nbytes, what):
        buffer = super().allocate(nbytes, what)
        buffer.close = lambda stream: self.freed.add(buffer.handle)
        return buffer


class CheckedLaunches(LaunchRecorder):
    """Holds every launch against its kernel's signature, the GPU's limits, and the memory that is still there."""

    def __init__(self, shared_memory, freed=frozenset()):
        super().__init__()
        self.shared_memory, self._freed, self.launched = shared_memory, freed, []

    def launch(self, program, kernel, grid, **arguments):
        super().launch(program, kernel, grid, **arguments)
        signatures_of(program.source)[kernel].check(arguments)
        assert (np.atleast_1d(grid) > 0).all() and 0 < program.threads_of(kernel) <= 1024
        assert program.shared_bytes <= self.shared_memory
        for name, value in arguments.items():
            gone = isinstance(value, DeviceArray) and value.address >> 40 << 40 in self._freed
            assert not gone, f"{kernel}: {name} lies in memory that was given back when an array grew"
        self.launched.append((program, kernel, grid, arguments))


@dataclass
class Names:
    """The names of arrays by where they begin, and how an address within one is said."""

    begins: dict = field(default_factory=dict)

    def note(self, name, array):
        self.begins[array.address] = name
        return array

    def of(self, value):
        if not isinstance(value, DeviceArray):
            return f"{value:.9g}" if isinstance(value, float) else str(value)
        begin = max(address for address in self.begins if address <= value.address)
        offset = f"+{value.address - begin}" if value.address > begin else ""
        shape = "x".join(map(str, value.shape))
        return f"{self.begins[begin]}{offset}:{value.dtype}[{shape}]"


class NamedWorkspace(Workspace):
    def __init__(self, gpu, names):
        super().__init__(gpu)
        self._names = names

    def array(self, name, dtype, *shape):
        return self._names.note(name.replace(" ", "_"), super().array(name, dtype, *shape))


class NamedSmallArrays(_OnesForVectors):
    def __init__(self, gpu, names):
        super().__init__(gpu)
        self._names = names

    def once(self, key, dtype, shape, make):
        name = f"constant{shape}" if isinstance(key[-1], bytes) else ",".join(map(str, key))
        return self._names.note(name.replace(" ", ""), super().once(key, dtype, shape, make))


class NamedTensorMaps(TensorMaps):
    def __init__(self, gpu, names):
        super().__init__(gpu)
        self._names, self._next = names, 1 << 60

    def of(self, array, box_rows):
        self._next += 128
        map_ = DeviceArray(self._next, np.dtype(np.uint8), (128,))
        return self._names.note(f"map({self._names.of(array)},{box_rows})", map_)


class NamedWeights(NoWeights):
    def __init__(self, host_embedding, names, precision):
        super().__init__(host_embedding, precision)
        self._names, self._addresses = names, {}

    def matrix(self, weight) -> Matrix:
        address = self._addresses.setdefault(weight.name, (1 << 58) + (len(self._addresses) << 40))
        matrix = matrix_of(weight.tensor, address, self.precision)
        self._names.note(weight.name, matrix.array)
        return matrix


def launches_of(family, facts, kernel_set, batch, logits, host_embedding=False, precision="exact"):
    """(the launches of a batch, their Names)"""
    gpu, names = CheckedGpu(facts), Names()
    launcher = CheckedLaunches(facts.shared_memory, gpu.freed)
    context = Context.of(
        gpu,
        kernel_set,
        launcher,
        NamedWorkspace(gpu, names),
        _NoDownloads(gpu),
        NamedTensorMaps(gpu, names),
        NamedWeights(host_embedding, names, precision),
        NamedSmallArrays(gpu, names),
    )
    ops = CudaOps(context, family, batch, None)
    family.finish(ops, family.forward(ops), logits)
    return launcher.launched, names


def described(launched, names):
    """A paragraph a launch."""
    for program, kernel, grid, arguments in launched:
        grid = "x".join(map(str, np.atleast_1d(grid)))
        block = f"{program.threads_of(kernel)} threads, {program.shared_bytes} bytes"
        yield f"{kernel} of {program}: {grid} blocks of {block}"
        yield from (f"  {name} = {names.of(arguments[name])}" for name in signatures_of(program.source)[kernel].names)


def shared_prompt(tokens):
    """A batch of a prompt and two sequences that continue it, every position a target."""
    ids, prompt = np.arange(tokens, dtype=np.int32) % 100, tokens - 2 * (tokens // 4)
    part = tokens // 4
    segments = (
        Segment(0, prompt),
        Segment(prompt, part, prompt, 0),
        Segment(prompt + part, part, prompt, 0),
    )
    return Batch(ids, segments=segments, targets=Targets(np.arange(tokens, dtype=np.int32), ids, 2))


def _mixed(name, layer):
    return GGML.F32 if name == "ffn_gate_inp" else GGML.Q6_K if name in ("attn_v", "ffn_down") else GGML.Q4_K


_DENSE = Shape("qwen3", 1, 512, 8, 2, 64, 768, 320, 4096, 1e6)
_ODD = Shape("qwen2", 1, 480, 6, 2, 80, 1000, 333, 4096, 1e6)  # widths that are no multiple of 64, and biases
_EXPERTS = Shape("gpt-oss", 1, 512, 8, 2, 64, 256, 320, 4096, 1e6, window=64, yarn=4.0, experts=16, used=3)
_SHORT_EXPERTS = replace(_EXPERTS, layers=2, ffn=704, experts=4)  # whose down has a kernel of its own on Hopper
_DELTA = {
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.state_size": 64,
    "ssm.inner_size": 256,
    "ssm.conv_kernel": 4,
    "full_attention_interval": 2,
    "rope.dimension_sections": [11, 11, 10, 0],
}
_RECURRENT = Shape("qwen35", 2, 512, 4, 2, 128, 768, 320, 4096, 1e7, more=_DELTA)
_LAYERS = {
    "attention.sliding_window_pattern": [True, False, True, False],
    "attention.head_count_kv": [2, 1, 2, 1],
    "attention.key_length_swa": 64,
    "attention.value_length_swa": 64,
    "attention.shared_kv_layers": 2,
    "embedding_length_per_layer_input": 64,
}
_PER_LAYER = Shape(
    "gemma4", 4, 256, 4, 2, 512, 512, 320, 4096, 1e6, tied=True, window=64, experts=16, used=3, more=_LAYERS
)
_LATENT = Shape(
    "deepseek2",
    2,
    *(256, 10, 1, 128, 64, 320, 4096, 1e4),
    experts=4,
    used=2,
    more={
        "attention.q_lora_rank": 96,
        "attention.kv_lora_rank": 100,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "rope.dimension_count": 64,
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
    },
)
# name -> (model, batch, logits, whether the embedding's rows come from the host, precision)
CASES = {
    "prompt": (_DENSE, Batch(np.arange(17, dtype=np.int32)), "last", False, "exact"),
    "odd sizes": (_ODD, Batch(np.arange(2000, dtype=np.int32) % 300), "all", False, "exact"),
    "packed": (_DENSE, shared_prompt(700), "ranks", True, "exact"),
    "experts": (_EXPERTS, Batch(np.arange(300, dtype=np.int32)), None, False, "exact"),
    "recurrence": (_RECURRENT, shared_prompt(300), None, False, "exact"),
    "latent": (_LATENT, shared_prompt(300), None, False, "exact"),
    "heads and embeddings by layer": (_PER_LAYER, shared_prompt(300), None, False, "exact"),
    "int8": (replace(_DENSE, layers=2), Batch(np.arange(600, dtype=np.int32) % 300), None, False, "int8"),
    "int8 experts": (replace(_EXPERTS, layers=2), Batch(np.arange(300, dtype=np.int32)), None, False, "int8"),
    "int8 short experts": (_SHORT_EXPERTS, Batch(np.arange(400, dtype=np.int32) % 300), None, False, "int8"),
}
KERNELS = {"hopper": ((9, 0), "auto"), "portable": ((8, 0), "auto")}


def path_of(case, kernels):
    """Where the launches of a case are written down."""
    return FOLDER / f"{case.replace(' ', '-')}-{kernels}.txt"


def text_of_case(case, kernels):
    """What such a batch launches with those kernels."""
    shape, batch, logits, host_embedding, precision = CASES[case]
    capability, choice = KERNELS[kernels]
    family = read_model(SyntheticFile(shape, _mixed, case))
    kernel_set = kernel_set_of(capability, choice)
    launched = launches_of(family, Facts(capability), kernel_set, batch, logits, host_embedding, precision)
    return "\n".join(described(*launched)) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        for kernels in KERNELS:
            path_of(case, kernels).write_text(text_of_case(case, kernels))
