"""What all ops share: one batch's inputs on the device, its layers' states, and products with quantised matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ....core import Batch, KeysValues, Latent, LayerState, Logits, SharedKeysValues
from ....models.family import Family
from ....models.ops import Ops
from ....models.weights import Weight
from ..attention_kernels import AttentionConfig
from ..device.arrays import FLOAT16, FLOAT32, DeviceArray
from ..device.signatures import Argument
from ..device.workspace import Workspace
from ..gemm.operand import HALVES, Operand
from ..kv_cache import DeviceCache, token_shapes
from ..weights.matrix import Matrix
from .attention_layout import attention_configs, attention_layout
from .collector import DeviceCollector
from .context import Context

# Tokens. Blocks that start early gather on the first multiprocessors that have room: no matter where there are many
# more than these, but a small launch should spread over all (an H100 at 16 tokens: 3.6 ms without, 5.0 ms with).
_OVERLAP_FROM = 257
TOKENS_AT_ONCE = 16384  # whose q/k/v sums, or gate and up, exist at a time
CHUNKS_AT_ONCE = 128  # of recurrences, and at most as many times DELTA_CHUNK tokens


@dataclass(frozen=True)
class ResidualBound:
    """No value of a residual stream is larger than |scale| times the embedding's largest, and `added`."""

    embedding: Weight
    scale: float
    added: float = 0.0


class Combination:
    """Experts' outputs that are yet to be added to a residual stream: by the norm that comes next, as it reads the
    stream, or else by a kernel of their own."""

    def __init__(self, copies: dict[str, Argument], add: Callable[[], None]) -> None:
        self._copies: dict[str, Argument] | None = copies
        self._add = add

    def take(self) -> dict[str, Argument] | None:
        """What a kernel is told that adds them (kernels/include/combine.cuh); None where they have been added."""
        copies, self._copies = self._copies, None
        return copies

    def add(self) -> None:
        """Launch what adds them, unless that has been done."""
        if self.take() is not None:
            self._add()


@dataclass(frozen=True)
class Residual:
    """The residual stream, float32 [T, H].

    array: where it is. bound: on its values, known while only norms' outputs were added. combination: what may have to
    be added to what is there.
    """

    array: DeviceArray
    bound: ResidualBound | None = None
    combination: Combination | None = None

    @property
    def values(self) -> DeviceArray:
        """All of it, for launches that follow."""
        if self.combination is not None:
            self.combination.add()
        return self.array

    def finished(self) -> Residual:
        """The same, to which nothing has to be added."""
        return Residual(self.values, self.bound)


def received(ops: BatchOps, family: Family) -> DeviceArray:
    """Where a residual stream that another device has made is put."""
    return ops.work.array("received", FLOAT32, *family.residual_shape(len(ops.batch.tokens)))


def is_last_alone(logits: Logits) -> bool:
    """Whether nothing is asked of a batch but its last position."""
    return logits in (None, "last")


@dataclass(frozen=True)
class Attending:
    """How attention over a batch goes with heads of one size (attention_layout.py).

    rows: of k and v. query_tiles: int32 [tiles, 7]. key_row_of: which rows of k and v are the tokens', int32 [T], where
    these are not in order; key_copies: int32 [copies, 2], the rows that are then to be copied. Both are None elsewhere.
    chunk_tiles: as query_tiles, for layers in which queries see their own chunk of the sequence only.
    """

    config: AttentionConfig
    rows: int
    query_tiles: DeviceArray
    key_row_of: DeviceArray | None = None
    key_copies: DeviceArray | None = None
    chunk_tiles: DeviceArray | None = None


class LayerStates(Protocol):
    """Where the layers' states of a batch's sequences are: a cache, or work arrays."""

    def keys_values(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's keys and values: halves [rows, heads, padded head_dim] each."""

    def latent(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """A layer's latent rows: halves [rows, padded rank], an operand's, and [rows, rotary]."""

    def note_scales(self, layer: int, first: DeviceArray, second: DeviceArray) -> None:
        """Say what the halves in a layer's two arrays are times."""

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        """Launch what has a layer's states of `start` tokens ready; n more are to be written."""

    def end_batch(self, start: int, n: int) -> None:
        """Wait until the last layer's states are kept."""


class _WorkStates:
    """LayerStates that nobody keeps: one layer's are written over the one before, but those that later layers see."""

    def __init__(self, work: Workspace, states: Sequence[LayerState], rows: int) -> None:
        self._work, self._states, self._rows = work, states, rows
        self._seen_again = {state.layer for state in states if isinstance(state, SharedKeysValues)}

    def keys_values(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        state = self._states[layer].part(KeysValues)
        assert state is not None, "a layer with keys and values of its own"
        of = f" of layer {layer}" if layer in self._seen_again else ""
        return self._arrays(state, f"k{of}", f"v{of}")

    def latent(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        state = self._states[layer].part(Latent)
        assert state is not None, "a layer with latent attention"
        return self._arrays(state, "latent rows", "latent keys")

    def _arrays(self, state: KeysValues | Latent, *names: str) -> tuple[DeviceArray, DeviceArray]:
        first, second = (
            self._work.array(name, FLOAT16, self._rows, *shape) for name, shape in zip(names, token_shapes(state))
        )
        return first, second

    def note_scales(self, layer: int, first: DeviceArray, second: DeviceArray) -> None:
        pass

    def begin_layer(self, layer: int, start: int, n: int) -> None:
        pass

    def end_batch(self, start: int, n: int) -> None:
        pass


class BatchOps(Ops):
    """All that is uploaded for a batch goes up here: the ops themselves only launch, so that they can be captured as a
    graph.

    key_rows: rows of keys and values to have room for, where they are more than the batch's own. last_alone: nothing is
    asked of the batch but its last position. n: the tokens that ops compute: all of them, but from the last layer's
    attention on only the last one, where it is alone.
    """

    collector: DeviceCollector | None

    def __init__(
        self,
        context: Context,
        family: Family,
        batch: Batch,
        cache: DeviceCache | None,
        key_rows: int = 0,
        last_alone: bool = False,
    ) -> None:
        self.context, self.config, self.batch, self.cache = context, family.config, batch, cache
        self.launcher, self.work, self.scales = context.launcher, context.work, context.scales
        self.int8_norms = family.int8_norms
        self._last_alone = last_alone and family.by_rows_after_attention and len(batch.segments) == 1
        self.n = len(batch.tokens)
        self.launcher.overlap = self.n >= _OVERLAP_FROM
        self._of_shape: list[tuple[str, np.ndarray[Any, Any]]] = []
        self.positions = self.keep("positions", batch.positions)
        kinds = attention_configs(family, context.kernel_set)
        self._attending = {s: self._upload_layout(batch, config, family.chunk) for s, config in kinds.items()}
        self.key_rows = max(key_rows, *(attending.rows for attending in self._attending.values()))
        self.states: LayerStates = cache or _WorkStates(self.work, family.layer_states, self.key_rows)
        self.rope_tables: dict[int, DeviceArray] = {}  # by the id of their Rope
        # Of recurrences, where a batch is planned for: its sequences may be as short as can be.
        self.planned_chunks = min(self.n, CHUNKS_AT_ONCE) if key_rows else 0
        self.begin_batch(family)
        self.begin_tokens()

    def begin_again(self, batch: Batch) -> None:
        """Go on with another batch, of segments as these, whose launches are a graph already."""
        self.batch = batch
        self.launcher.overlap = len(batch.tokens) >= _OVERLAP_FROM
        self.begin_tokens()
        for name, array in self._of_shape:
            self.work.keep(name, array)

    def rewind(self) -> None:
        """Go back to before the first layer: what follows launches the same once more."""
        self.n = len(self.batch.tokens)
        self.rope_tables.clear()

    def keep(self, name: str, array: np.ndarray[Any, Any]) -> DeviceArray:
        """Workspace.keep, of what follows from the batch's segments alone: `begin_again` calls it once more."""
        self._of_shape.append((name, array))
        return self.work.keep(name, array)

    def _upload_layout(self, batch: Batch, config: AttentionConfig, chunk: int | None) -> Attending:
        layout, of = attention_layout(batch.segments, config, chunk), f"of {config.head_dim}, {config.value_dim}"
        tiles, of_chunks = self.keep(f"tiles {of}", layout.tiles), None
        if layout.chunk_tiles is not None:
            of_chunks = self.keep(f"tiles of chunks {of}", layout.chunk_tiles)
        if not len(layout.copies):
            return Attending(config, layout.rows, tiles, chunk_tiles=of_chunks)
        row_of = self.keep(f"kv rows {of}", layout.row_of)
        copies = self.keep(f"kv copies {of}", layout.copies)
        return Attending(config, layout.rows, tiles, row_of, copies, of_chunks)

    @property
    def leaves_one(self) -> bool:
        """Whether this layer's attention is of the last position alone, and all that comes after it."""
        return self._last_alone and self.layer == self.config.block_count - 1 and self.collector is None

    def stream(self, x: Residual) -> Residual:
        """The rows of the residual stream that ops compute."""
        if self.n == len(self.batch.tokens):
            return x
        values = x.values
        return Residual(values.rows(values.shape[0] - self.n), x.bound)

    def operand(self, a: Operand) -> Operand:
        """The same of an operand."""
        return a if self.n == len(self.batch.tokens) else a.part(a.rows - self.n, a.rows)

    def own(self, a: Operand, residual: Residual | None) -> tuple[Operand, Residual | None]:
        """The same of both that a product is given."""
        return self.operand(a), None if residual is None else self.stream(residual)

    def attending(self, head_dim: int, value_dim: int) -> Attending:
        """How attention goes in layers with such heads."""
        return self._attending[head_dim, value_dim]

    def begin_batch(self, family: Family) -> None:
        """Have on the device what only some families' ops need and follows from the batch's segments."""

    def begin_tokens(self) -> None:
        """Upload what follows from the batch's tokens."""
        self.tokens = self.work.upload("tokens", self.batch.tokens)
        if self.batch.targets is not None:
            self.target_rows = self.work.upload("target rows", self.batch.targets.rows)
            self.target_tokens = self.work.upload("targets", self.batch.targets.tokens)

    def begin_layer(self, index: int) -> None:
        super().begin_layer(index)
        weights = self.context.weights
        if weights.streaming:
            self.enter("streaming")
            weights.begin_layer(index)
        if self.cache is not None:
            self.cache.begin_layer(index, self.batch.start, self.n)
            self.launcher.fence()

    def matrix(self, weight: Weight) -> Matrix:
        """A weight's matrix on the device."""
        return self.context.weights.matrix(weight)

    def vector(self, weight: Weight | None) -> DeviceArray | None:
        """A norm's weight or the like, float32; None for None."""
        return self.context.small.vector(weight.tensor)[0] if weight is not None else None

    def bias(self, weight: Weight) -> DeviceArray | None:
        """A matrix's bias, or biases [experts, rows], where the file has one."""
        return self.context.small.vector(weight.bias)[0] if weight.bias is not None else None

    def hear(
        self,
        weights: Sequence[Weight],
        a: Operand,
        first: int = 0,
        firsts: DeviceArray | None = None,
        row_scale: DeviceArray | None = None,
    ) -> None:
        """An operand, the batch's rows from number `first` on, is about to be multiplied by these weights; firsts,
        row_scale: as for DeviceCollector.add."""
        if self.collector is not None:
            names, scale = [weight.name for weight in weights], a.row_scale if row_scale is None else row_scale
            self.collector.add(names, a, self.sequence_length, first, firsts, scale)

    @property
    def sequence_length(self) -> int:
        """Tokens of each of the batch's sequences; all of the batch's where they differ."""
        segments = self.batch.segments
        length = segments[0].length
        return length if all(s.first == i * length for i, s in enumerate(segments)) else self.n

    def multiply(
        self,
        a: Operand,
        matrices: Sequence[Matrix],
        out: DeviceArray,
        bias: DeviceArray | None = None,
        add: bool = False,
    ) -> None:
        """out = a · [matrices, one under another]ᵀ + bias (+ out, if add), a row for each of a's."""
        gemm = self.context.gemms.choose(matrices)
        gemm.linear(a, matrices, out, self.scales.of_weights(matrices, a.norm), bias, add)

    def scaled(self, a: Operand, factor: float) -> Operand:
        """The same operand, said to be scaled such that products come out times `factor`."""
        assert factor == 1.0 or a.format is HALVES, "a norm's output is multiplied as it is"
        return a if factor == 1.0 else replace(a, scale=self.scales.divided(a.scale, factor), rounded=None)
