"""Where what lies in a state file: a function of the model's layers, the format, and the number of tokens.

A file is a magic number, a version, the token ids, in a session the architecture's name; then a cache of the layers
that see all tokens, perhaps one of those with a sliding window, perhaps the recurrences' states. A cache lists its
cells (tokens), then the keys of all its layers, then the values of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import struct

import numpy as np

from ..core import Recurrent
from ..errors import InputError
from . import FORMATS as NAMES
from .elements import ELEMENTS, Element, key_rotation, value_rotation

SEQUENCE, SESSION = 0x67677371, 0x6767736E  # "ggsq" and "ggsn", as numbers
DEFAULT_SPARE_CELLS = 512  # of a sliding cache beside its window: the tokens of llama.cpp's micro-batch (-ub)


@dataclass(frozen=True)
class Format:
    """A kind of file and its version. Readers take no other than their own."""

    name: str
    magic: int
    version: int

    @property
    def session(self) -> bool:
        """Whether it is a session (llama-completion --prompt-cache), not a sequence (llama-server, the C API)."""
        return self.magic == SESSION

    @property
    def has_rotations(self) -> bool:
        """Whether it says how keys and values are rotated (from llama.cpp v0.6.0 on)."""
        return self.version >= (11 if self.session else 4)

    @property
    def extra_bytes(self) -> int:
        """Of a cell of a model whose positions have several axes (llama.cpp v0.4.0 added a token id)."""
        return 12 if self.version >= (10 if self.session else 3) else 8


_MAGIC = {"ggsq": SEQUENCE, "ggsn": SESSION}
FORMATS = {name: Format(name, _MAGIC[name[:4]], int(name[5:])) for name in NAMES}
NEWEST = NAMES[0]


@dataclass(frozen=True)
class AttentionLayer:
    """A layer in a cache: its number in the model; the heads of a key's row, and of a value's, and their sizes. Where
    latent rows are kept they are keys of one head, and there are no values."""

    layer: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def key_width(self) -> int:
        """Values of one token's keys."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Values of one token's values."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class StateShape:
    """What of a model a state depends on.

    full: the layers whose queries see all tokens, in order; sliding: those that see `window` of them (None: the model
    has no such cache). recurrent: (layer, its state), in order, of `layers` in all. axes: whether cells have a position
    on several axes.
    """

    architecture: str
    layers: int
    full: tuple[AttentionLayer, ...]
    sliding: tuple[AttentionLayer, ...] | None = None
    window: int = 0
    recurrent: tuple[tuple[int, Recurrent], ...] = ()
    axes: bool = False

    @property
    def caches(self) -> list[tuple[AttentionLayer, ...]]:
        """Of attention: the one that sees all tokens, then the sliding one."""
        if self.sliding is None:
            return [self.full] if self.full or not self.recurrent else []
        return [self.full, self.sliding]


@dataclass(frozen=True)
class StateOptions:
    """How a state is written.

    format: of FORMATS. keys, values: of ELEMENTS, as the decoder's --cache-type-k and --cache-type-v. transposed:
    whether values are, as where the decoder's flash attention is off. cells: tokens in a sliding cache at most, None
    for its window and DEFAULT_SPARE_CELLS. streams: of the decoder's cache; its first gets the sequence.
    """

    format: str = NEWEST
    keys: str = "f16"
    values: str = "f16"
    transposed: bool = False
    cells: int | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for options that are unknown or contradict."""
        for what, value, known in (
            ("format", self.format, FORMATS),
            ("type of keys", self.keys, ELEMENTS),
            ("type of values", self.values, ELEMENTS),
        ):
            if value not in known:
                raise InputError(f"a state's {what} {value!r} is unknown; choose one of {', '.join(known)}")
        if self.transposed and ELEMENTS[self.values].quantised:
            raise InputError(f"values in {self.values} cannot be transposed: llama.cpp wants flash attention for them")
        if self.streams < 1 or (self.cells is not None and self.cells < 1):
            raise InputError(f"a state of {self.streams} streams and {self.cells} cells: at least 1 of each is needed")


@dataclass(frozen=True)
class Rows:
    """Where the rows of one layer's keys, or values, are: from `offset` on, a row of `width` values for each cell; or
    the transpose. rotation: of how many values together, 0 for none."""

    offset: int
    element: Element
    width: int
    cells: int
    rotation: int
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.cells * self.element.row_bytes(self.width)


@dataclass(frozen=True)
class LayerPlace:
    """A layer's keys and values in a file; first: the token that the first cell is of."""

    first: int
    keys: Rows
    values: Rows | None


@dataclass
class Layout:
    """A whole file: `fixed` has the bytes that do not depend on what was computed, by their offset; `attention` and
    `recurrent` say by layer where the rest goes; of a recurrence the offsets of the convolution's rows, and of the
    matrices."""

    fixed: list[tuple[int, bytes]]
    attention: dict[int, LayerPlace]
    recurrent: dict[int, tuple[int, int]]
    nbytes: int


def layout(shape: StateShape, options: StateOptions, tokens: Sequence[int], cells: int) -> Layout:
    """The layout of a state of the first `cells` of a sequence's tokens, all of which are listed.

    Raises InputError where the model's rows cannot be stored as the options say.
    """
    made, builder = FORMATS[options.format], _Builder()
    builder.add(struct.pack("<III", made.magic, made.version, len(tokens)) + _int32s(tokens))
    if made.session:
        name = shape.architecture.encode()
        builder.add(struct.pack("<I", len(name)) + name)
    for number, layers in enumerate(shape.caches):
        kept = cells
        if number == 1:
            most = shape.window + DEFAULT_SPARE_CELLS if options.cells is None else options.cells
            kept = min(cells, max(most, shape.window))
        _add_cache(builder, shape, options, layers, tokens, cells - kept, cells)
    if shape.recurrent:
        _add_recurrent(builder, shape, made, cells)
    return Layout(builder.done(), builder.attention, builder.recurrent, builder.at)


class _Builder:
    """Bytes and gaps, one after another."""

    def __init__(self) -> None:
        self.at = 0
        self.attention: dict[int, LayerPlace] = {}
        self.recurrent: dict[int, tuple[int, int]] = {}
        self._fixed: list[tuple[int, bytes]] = []

    def add(self, data: bytes) -> None:
        self._fixed.append((self.at, data))
        self.at += len(data)

    def skip(self, nbytes: int) -> int:
        """Where a gap begins."""
        self.at += nbytes
        return self.at - nbytes

    def done(self) -> list[tuple[int, bytes]]:
        return self._fixed


def _int32s(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _add_cache(
    builder: _Builder,
    shape: StateShape,
    options: StateOptions,
    layers: Sequence[AttentionLayer],
    tokens: Sequence[int],
    first: int,
    end: int,
) -> None:
    """A cache whose cells are the tokens from `first` to before `end`."""
    made, cells = FORMATS[options.format], end - first
    keys, values = ELEMENTS[options.keys], ELEMENTS[options.values]
    for layer in layers:
        for element, width in ((keys, layer.key_dim), (values, layer.value_dim)):
            if width % element.block:
                raise InputError(
                    f"layer {layer.layer}'s heads of {width} values cannot be stored as {element.name}, which wants "
                    f"multiples of {element.block}; use f16"
                )
    turns = rotations(layers, keys, values)
    builder.add(struct.pack("<II", options.streams, cells))
    if cells:
        builder.add(_cells(tokens, first, end, made.extra_bytes // 4 * shape.axes))
        builder.add(struct.pack("<II", int(options.transposed), len(layers)))
        if made.has_rotations:
            builder.add(struct.pack("<II", *turns))
        at = {}
        for layer in layers:
            builder.add(struct.pack("<iQ", keys.number, keys.row_bytes(layer.key_width)))
            at[layer.layer] = builder.skip(cells * keys.row_bytes(layer.key_width))
        for layer in layers:
            key_rows = Rows(at[layer.layer], keys, layer.key_width, cells, turns[0])
            value_rows = None
            if layer.value_width:
                if options.transposed:
                    builder.add(struct.pack("<iII", values.number, values.nbytes, layer.value_width))
                else:
                    builder.add(struct.pack("<iQ", values.number, values.row_bytes(layer.value_width)))
                offset = builder.skip(cells * values.row_bytes(layer.value_width))
                value_rows = Rows(offset, values, layer.value_width, cells, turns[1], options.transposed)
            builder.attention[layer.layer] = LayerPlace(first, key_rows, value_rows)
    builder.add(struct.pack("<I", 0) * (options.streams - 1))


def _cells(tokens: Sequence[int], first: int, end: int, extra: int) -> bytes:
    """Of each token its position, its one sequence, and `extra` numbers: positions on two axes, then its id."""
    positions = np.arange(first, end, dtype="<i4")
    ids = np.asarray(tokens[first:end], "<i4")
    return np.stack([positions, 0 * ids + 1, *[positions, positions, ids][:extra], 0 * ids], axis=1).tobytes()


def rotations(layers: Sequence[AttentionLayer], keys: Element, values: Element) -> tuple[int, int]:
    """How many values of a cache's keys, and of its values, are rotated together."""
    return (
        key_rotation(keys, {layer.key_dim for layer in layers}),
        value_rotation(values, {layer.value_dim for layer in layers}),
    )


def _add_recurrent(builder: _Builder, shape: StateShape, made: Format, cells: int) -> None:
    """The state after the first `cells` tokens: one cell, then every layer's convolution, then every layer's
    matrices."""
    ids = (0,) if made.session else ()
    builder.add(struct.pack("<IiI", 1, cells - 1, len(ids)) + _int32s(ids))
    builder.add(struct.pack("<II", 0, shape.layers))
    number, at = ELEMENTS["f32"].number, {}
    for layer, state in shape.recurrent:
        nbytes = 4 * state.taps * state.channels
        builder.add(struct.pack("<iQ", number, nbytes))
        at[layer] = builder.skip(nbytes)
    for layer, state in shape.recurrent:
        nbytes = 4 * state.matrix_values
        builder.add(struct.pack("<iQ", number, nbytes))
        builder.recurrent[layer] = at[layer], builder.skip(nbytes)
