"""Which weights stay in GPU memory and which are streamed through it for each prompt: decided before anything is
allocated.

Weights stay where all fit. Else as many layers as fit stay, spread evenly, so that the copies of those between have
their time too; the others' weights come through staging buffers while earlier layers compute (staging.py), and the
embedding's rows from the host, for the prompt's tokens only. What is left where all stay may hold them as halves, too
(halves.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
import math

from ....errors import BackendError
from ....models.family import Family
from ....models.precision import Precision
from ...budget import Budget, gib, gib_at_least, host_memory
from ..constants import MOST_EXPERT_GROUPS, MOST_EXPERTS, MOST_USED_EXPERTS, TILE_ROWS
from ..device.compiler import Program
from ..device.gpu import Gpu
from ..device.workspace import ALIGNMENT, aligned
from .halves import halves_bytes
from .host_pages import WINDOW
from .matrix import layer_matrices, matrix_of, tile_bytes
from .share import Share
from .staging import STAGING_BYTES, STAGING_SLOTS, scratch_bytes

CROSSINGS = 2  # residual streams that have come from another device and wait, at most
CONTEXT_BYTES = 560 << 20  # that the driver takes for a context and our kernels (an H100: 540 MiB)
_SLACK_BYTES, _SLACK_SHARE = (
    64 << 20,
    0.012,
)  # that its allocator takes beyond what is asked for (an H100: 20 to 230 MiB)
SPARE_BYTES = 128 << 20  # left free where no budget is given
_AS_HALVES = "weights as halves"  # the part of a plan that is the room for them
_LOCKED_IN_PASSING = 32 << 30  # host memory that is locked at a time where it is read once: unlocking can wait


@dataclass(frozen=True)
class BatchNeeds:
    """What a batch takes, found by rehearsing it.

    work_bytes: of work arrays. programs: that its kernels are in. matrix_flops: multiplications and additions by the
    layers' matrices.
    """

    work_bytes: int
    programs: tuple[Program, ...]
    matrix_flops: int


@dataclass(frozen=True)
class Plan:
    """What of a model stays in GPU memory.

    budget: bytes of GPU memory that may be taken. tokens: of the longest prompt planned for, and needs: what such a
    batch takes. share: the layers that the device runs. resident, streamed: which of them. parts: bytes by what takes
    them. streamed_bytes: over the bus for each prompt. slot_bytes: of a staging buffer. tile_bytes: of the largest
    streamed layer in tiles.
    """

    budget: int
    tokens: int
    needs: BatchNeeds
    share: Share
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    parts: dict[str, int]
    streamed_bytes: int
    slot_bytes: int
    tile_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that are planned for."""
        return sum(self.parts.values())

    @property
    def halves_bytes(self) -> int:
        """Those of them that weights which stay may be kept in as halves, too (halves.py): a model runs without."""
        return self.parts.get(_AS_HALVES, 0)

    @property
    def least_bytes(self) -> int:
        """Those of them that a model does not run without."""
        return self.nbytes - self.halves_bytes

    def with_halves(self, nbytes: int) -> Plan:
        """The same with so many bytes for weights as halves."""
        return self._with({_AS_HALVES: nbytes})

    def with_caches(self, nbytes: int) -> Plan:
        """The same with so many bytes of caches, which take from the room of weights as halves what is free nowhere
        else."""
        left = self.budget - self.least_bytes + self.parts.get("caches", 0) - nbytes
        return self._with({"caches": nbytes, _AS_HALVES: max(0, min(self.halves_bytes, left))})

    def _with(self, parts: dict[str, int]) -> Plan:
        changed = {**self.parts, **parts}
        return replace(self, parts={name: nbytes for name, nbytes in changed.items() if nbytes})

    @property
    def host_bytes(self) -> int:
        """Host memory that may stay locked: all of a model that is streamed, where it is the lesser part of the
        machine's; a part of one that is read in passing."""
        memory = host_memory()
        # A layer's first and last windows are not all its own.
        wanted = self.streamed_bytes + 4 * WINDOW * len(self.streamed)
        return wanted if self.streamed and wanted < memory // 2 else min(_LOCKED_IN_PASSING, memory // 4)

    def places_as(self, other: Plan) -> bool:
        """Whether the other plan has the same weights in the same places."""
        own, others = ((plan.share, plan.resident, plan.slot_bytes, plan.tile_bytes) for plan in (self, other))
        return own == others


def budget_of(gpu: Gpu, vram: Budget | None) -> int:
    """Bytes that may be taken on an open Gpu, its context included: a Budget's, or all that is free."""
    free, total = gpu.memory()
    return free + CONTEXT_BYTES - SPARE_BYTES if vram is None else vram.of(total)


def refuse_unsupported(family: Family) -> None:
    """Raises BackendError for a model whose layers CUDA does not have all of."""
    experts = family.experts
    if experts is not None and experts.groups > MOST_EXPERT_GROUPS:
        raise BackendError(
            f"{family.file.path}: {experts.groups} groups of experts do not run on CUDA (at most "
            f"{MOST_EXPERT_GROUPS}); use --backend cpu"
        )
    if experts is not None and (experts.count > MOST_EXPERTS or experts.used > MOST_USED_EXPERTS):
        raise BackendError(
            f"{family.file.path}: {experts.used} of {experts.count} experts do not run on CUDA (at most "
            f"{MOST_USED_EXPERTS} of {MOST_EXPERTS}); use --backend cpu"
        )


def make_plan(
    family: Family,
    budget: int,
    tokens: int,
    needs: Callable[[bool], BatchNeeds],
    share: Share,
    cache_bytes: int = 0,
    sums_bytes: int = 0,
    precision: Precision = "exact",
    keeps_halves: bool = False,
) -> Plan:
    """A Plan for a model, or some of its layers, on a GPU that may take `budget` bytes.

    tokens: of the longest prompt. needs(host_embedding): what such a batch takes where the embedding is on the device,
    or on the host. cache_bytes, sums_bytes: device memory that caches, and a collector's sums, hold. precision: that
    the model is opened with. keeps_halves: whether weights that stay are kept as halves, too, in what is left where all
    of them do. Raises BackendError where even streaming every layer takes more.
    """
    own, layers = share.layers, layer_matrices(family)
    tiles = [tile_bytes(tensors, precision) for tensors in layers]
    scratch = scratch_bytes((tensor for index in own for tensor in layers[index]), precision)
    raw = [sum(aligned(t.nbytes) for t in tensors) for tensors in layers]
    holds = share.holds_embedding(family)
    output, embedding = tile_bytes(share.outside(family)), tile_bytes([family.token_embd.tensor]) if holds else 0
    of_layers = (tensor for index in own for tensor in layers[index])
    exact = (tensor for tensor in of_layers if not matrix_of(tensor, 0, precision).int8)
    as_halves = halves_bytes([*share.outside(family), *exact])
    least_slot = aligned(max(TILE_ROWS * w.tensor.nbytes // math.prod(w.shape[:-1]) for w in family.matrices()))
    layers_that_stay = f"layers that stay{', in int8' if precision == 'int8' else ''}"
    parts = {"CUDA context": CONTEXT_BYTES, "output": output}
    if not share.is_first:
        parts["between devices"] = CROSSINGS * 4 * math.prod(family.residual_shape(tokens))
    if cache_bytes:
        parts["caches"] = cache_bytes
    if sums_bytes:
        parts["sums of squares"] = sums_bytes

    def plan(resident: Sequence[int], batch: BatchNeeds) -> Plan:
        streamed = tuple(i for i in own if i not in resident)
        slot = max(least_slot, *(raw[i] for i in streamed)) if streamed else STAGING_BYTES
        tile = max((tiles[i] for i in streamed), default=0)
        work, loading = batch.work_bytes, STAGING_SLOTS * STAGING_BYTES + scratch  # loading comes first
        takes = {
            **parts,
            "embedding": 0 if streamed else embedding,
            layers_that_stay: sum(tiles[i] for i in resident),
            "streaming buffers": STAGING_SLOTS * slot + tile + scratch if streamed else 0,
            "activations, K, V": work if streamed else max(work, loading),
        }
        if keeps_halves and not streamed:
            left = int((budget - _SLACK_BYTES) / (1 + _SLACK_SHARE)) - sum(takes.values())
            takes[_AS_HALVES] = max(0, min(as_halves, left // ALIGNMENT * ALIGNMENT))
        takes["allocator's slack"] = _SLACK_BYTES + int(_SLACK_SHARE * sum(takes.values()))
        return Plan(
            budget,
            tokens,
            batch,
            share,
            tuple(resident),
            streamed,
            {name: nbytes for name, nbytes in takes.items() if nbytes},
            sum(raw[i] for i in streamed),
            slot,
            tile,
        )

    everything = plan(own, needs(share.embeds_from_host(family, False)))
    if everything.nbytes <= budget:
        return everything
    batch = needs(share.embeds_from_host(family, True))
    for count in range(len(own) - 1, -1, -1):
        chosen = plan([own[i] for i in _spread(count, len(own))], batch)
        if chosen.nbytes <= budget:
            return chosen
    takes = ", ".join(f"{name} {gib(nbytes)}" for name, nbytes in chosen.parts.items())
    shorter = batch.work_bytes > chosen.nbytes // 2
    enough = gib_at_least(chosen.nbytes)
    way_out = f"{'a shorter prompt, ' if shorter else ''}a budget of {enough} (--vram {enough.split()[0]}G)"
    raise BackendError(
        f"{tokens} tokens need at least {enough} of GPU memory ({takes}), but {gib(budget)} may be taken "
        f"(--vram, or what is free); {way_out}, or --backend cpu would do"
    )


def _spread(count: int, layers: int) -> list[int]:
    """`count` of so many layers, as evenly spread as can be, the first and the last of them with half a gap before and
    after it: between two batches the bus has the time of the head already, and only the staging buffers to fill."""
    before = [(2 * i * count + layers) // (2 * layers) for i in range(layers + 1)]
    return [i for i in range(layers) if before[i + 1] > before[i]]
