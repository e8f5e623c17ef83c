"""Which weights stay in GPU memory and which are streamed through it for each prompt: decided before anything is allocated.

Weights stay where all fit. Else as many layers as fit stay, spread evenly, so that the copies of those between have their
time too; the others' weights come through staging buffers while earlier layers compute (staging.py), and the embedding's
rows from the host, for the prompt's tokens only.
"""

from dataclasses import dataclass
import math

from ...errors import BackendError
from .experts import MOST_EXPERTS, MOST_USED
from .memory import WINDOW, aligned, gib, host_memory
from .rehearsal import rehearse
from .staging import STAGING_BYTES, STAGING_SLOTS
from .tiles import TILE_ROWS
from .weights import layer_tensors, tile_bytes

CONTEXT_BYTES = 560 << 20  # that the driver takes for a context and our kernels (an H100: 540 MiB)
_SLACK_BYTES, _SLACK_SHARE = (
    64 << 20,
    0.012,
)  # that its allocator takes beyond what is asked for (an H100: 20 to 230 MiB)
SPARE_BYTES = 128 << 20  # left free where no budget is given
_LOCKED_IN_PASSING = 32 << 30  # host memory that is locked at a time where it is read once: unlocking can wait


@dataclass(frozen=True)
class Plan:
    """budget: bytes of GPU memory that may be taken; tokens: of the longest prompt planned for; resident, streamed: layers;
    parts: bytes by what takes them; streamed_bytes: over the bus for each prompt."""

    budget: int
    tokens: int
    resident: tuple
    streamed: tuple
    parts: dict
    streamed_bytes: int
    slot_bytes: int
    tile_bytes: int

    @property
    def nbytes(self):
        return sum(self.parts.values())

    @property
    def host_bytes(self):
        """Host memory that may stay locked: a model that is streamed, where it is the lesser part of the machine's; a part
        of one that is read in passing."""
        memory = host_memory()
        wanted = self.streamed_bytes + 4 * WINDOW * len(
            self.streamed
        )  # a layer's first and last windows are not all its own
        return wanted if self.streamed and wanted < memory // 2 else min(_LOCKED_IN_PASSING, memory // 4)


def budget_of(gpu, vram):
    """Bytes that may be taken on an open Gpu, its context included: a Budget's, or all that is free."""
    free, total = gpu.memory()
    return free + CONTEXT_BYTES - SPARE_BYTES if vram is None else vram.of(total)


def make_plan(family, facts, hopper, budget, tokens, cache_bytes=0, ranks=False):
    """A Plan for a model on a GPU (facts: see rehearsal.stand_in) that may take `budget` bytes.

    cache_bytes: device memory that caches hold. ranks: for batches with targets (Backend.load). Raises BackendError where even streaming every layer takes more, and for a
    model whose layers CUDA does not have all of.
    """
    if family.has_experts and (family.experts.count > MOST_EXPERTS or family.experts.used > MOST_USED):
        raise BackendError(
            f"{family.file.path}: {family.experts.used} of {family.experts.count} experts do not run on CUDA (at most {MOST_USED} of "
            f"{MOST_EXPERTS}); use --backend cpu"
        )
    layers = layer_tensors(family)
    tiles = [tile_bytes(tensors) for tensors in layers]
    raw = [sum(aligned(t.nbytes) for t in tensors) for tensors in layers]
    output, embedding = tile_bytes([family.output.tensor]), tile_bytes([family.token_embd.tensor])
    tied = family.output is family.token_embd
    least_slot = aligned(max(TILE_ROWS * w.tensor.nbytes // math.prod(w.shape[:-1]) for w in family.matrices()))
    parts = {"CUDA context": CONTEXT_BYTES, "output": output}
    if cache_bytes:
        parts["caches"] = cache_bytes

    def plan(resident, work):
        streamed = tuple(i for i in range(len(layers)) if i not in resident)
        slot = max(least_slot, *(raw[i] for i in streamed)) if streamed else STAGING_BYTES
        tile = max((tiles[i] for i in streamed), default=0)
        chosen = {
            **parts,
            "embedding": 0 if tied or streamed else embedding,
            "layers that stay": sum(tiles[i] for i in resident),
            "streaming buffers": STAGING_SLOTS * slot + tile if streamed else 0,
            "activations, K, V": work if streamed else max(work, STAGING_SLOTS * STAGING_BYTES),  # loading came first
        }
        chosen["allocator's slack"] = _SLACK_BYTES + int(_SLACK_SHARE * sum(chosen.values()))
        sizes = {name: nbytes for name, nbytes in chosen.items() if nbytes}
        return Plan(budget, tokens, tuple(resident), streamed, sizes, sum(raw[i] for i in streamed), slot, tile)

    everything = plan(range(len(layers)), rehearse(family, facts, hopper, tokens, ranks))
    if everything.nbytes <= budget:
        return everything
    work = rehearse(family, facts, hopper, tokens, ranks, host_embedding=not tied)
    for count in range(len(layers) - 1, -1, -1):
        spread = [i for i in range(len(layers)) if (i + 1) * count // len(layers) > i * count // len(layers)]
        found = plan(spread, work)
        if found.nbytes <= budget:
            return found
    takes = ", ".join(f"{name} {gib(nbytes)}" for name, nbytes in found.parts.items())
    way_out = "a shorter prompt" if work > found.nbytes // 2 else f"a budget of {gib(found.nbytes)}"
    raise BackendError(
        f"{tokens} tokens need at least {gib(found.nbytes)} of GPU memory ({takes}), but {gib(budget)} may be taken "
        f"(--vram, or what is free); {way_out} would do, or --backend cpu"
    )
