"""What a model family is: which tensors its files have, and what one layer does with them.

A family's page calls the ops of `kqprefill.models.ops.Ops` and reads like the model's formula; both backends run it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
import math
from typing import Any, TypeVar

from ..core import (
    Float32Array,
    KeysValues,
    LayerState,
    Logits,
    PendingHead,
    Progress,
    Recurrent,
    SharedKeysValues,
    no_progress,
)
from ..errors import ModelError
from ..gguf import ModelFile, dequantize
from .config import ArchMetadata, Config, Rope, read_rope
from .delta_net import DeltaNet
from .experts import Experts
from .kda import KimiDelta
from .mamba2 import Mamba2
from .ops import Ops, Residual
from .precision import norms_for_int8
from .weights import Parts, Shapes, Weight, Weights, bias_shape, tensor_names

_Page = TypeVar("_Page", bound="Family")
TOWERS = ("v.", "a.", "mm.")  # what tensors of vision, audio and projector are called (llama.cpp's clip.cpp)


class Family(ABC):
    """A decoder-only transformer; subclasses, one a page, say what differs.

    Made from metadata alone, a family describes a model: its sizes and its tensors' shapes. `open` binds it to a file's
    tensors; only then are there weights, and what the layers need beside them.

    Attributes once it is described: meta (the architecture's metadata); config; rotary_pairs (how many pairs of a
    head's elements are rotated); experts (None where a layer has one feed-forward network).

    Attributes once it is opened: file; blocks (Weights of each layer); shared (Weights outside the layers); token_embd,
    output_norm, output (Weight; a file without an output matrix uses the embedding's, "tied"); what
    `read_hyper_parameters` reads.
    """

    architecture = ""  # general.architecture
    examples = ""  # models that people look for, the best known first, parted by ", "
    rope_interleaved = False  # which elements pair up; see Rope
    layer_norm = False  # see Config
    chunk: int | None = None  # tokens of a chunk of the sequence, where some layers' queries see no more than theirs
    short_taps: int | None = None  # of convolutions that are a layer's mixer by themselves, where there are some
    last_norm = "output_norm"  # what files call the norm before the output matrix
    by_rows_after_attention = True  # whether ops after a layer's attention may compute some of the rows only
    both_ways = False  # whether tokens see those after them, too: such a model has vectors only, of whole sequences

    file: ModelFile
    shared: Weights
    blocks: list[Weights]
    token_embd: Weight
    output_norm: Weight
    output: Weight
    rope: Rope
    attention_scale: float

    def __init__(self, metadata: Mapping[str, Any], path: str, vocab_size: int) -> None:
        """Describe the model that the metadata of `path` has, with so many rows of token_embd.weight.

        Raises ModelError for metadata that is missing or contradicts.
        """
        self.meta = ArchMetadata(metadata, path, self.architecture)
        self.config = self.read_config(vocab_size)
        self.rotary_pairs = self.meta.integer("rope.dimension_count", self.config.head_dim) // 2
        self.experts = self.read_experts()

    @classmethod
    def open(cls: type[_Page], file: ModelFile) -> _Page:
        """The family over a file's tensors.

        Raises ModelError: a tensor missing, misshapen, unknown or of an unsupported type; metadata missing or
        contradicting.
        """
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
        meta = ArchMetadata(file.metadata, file.path, cls.architecture)
        count = meta.integer("block_count")
        if count > len(file.tensors):  # before anything is made for each layer
            raise meta.error(f"block_count is {count}, but the file has only {len(file.tensors)} tensors")
        family = cls(file.metadata, file.path, vocab_size=embedding.shape[0])
        family._bind(file)
        family.read_hyper_parameters()
        return family

    # What a family overrides -----------------------------------------------------------------------------------------

    def read_config(self, vocab_size: int) -> Config:
        """The model's sizes; part of the description."""
        return Config.from_gguf(self.meta, vocab_size, layer_norm=self.layer_norm)

    def block_shapes(self, index: int) -> Shapes:
        """The shapes of a layer's tensors, by their names within its block."""
        c = self.config
        return {
            "attn_norm": (c.embedding_length,),
            "attn_q": (c.q_width, c.embedding_length),
            "attn_k": (c.kv_width, c.embedding_length),
            "attn_v": (c.kv_width, c.embedding_length),
            "attn_output": (c.embedding_length, c.q_width),
            "ffn_norm": (c.embedding_length,),
            "ffn_gate": (c.feed_forward_length, c.embedding_length),
            "ffn_up": (c.feed_forward_length, c.embedding_length),
            "ffn_down": (c.embedding_length, c.feed_forward_length),
        }

    def shared_shapes(self) -> Shapes:
        """The shapes of the tensors outside the blocks."""
        c = self.config
        return {
            "token_embd": (c.vocab_size, c.embedding_length),
            self.last_norm: (c.embedding_length,),
            "output?": (c.vocab_size, c.embedding_length),
            "rope_freqs?": (self.rotary_pairs,),
        }

    def other_matrices(self) -> list[Weight]:
        """The matrices outside the layers that something is multiplied by, but the output; there are few."""
        return []

    def projections(self) -> list[Weight]:
        """The matrices that a pooled vector goes through, one after another."""
        return []

    def row_table(self) -> Weight | None:
        """A matrix beside the embedding of which only rows are looked up, one a token; it stays in the file."""
        return None

    def block_parts(self, index: int) -> Parts:
        """The matrices of a block that this family keeps one under another in one tensor."""
        return {}

    def read_experts(self) -> Experts | None:
        """The experts of each layer, if any; part of the description."""
        return None

    def read_hyper_parameters(self) -> None:
        """Read what the layers need beyond Config, the tensors being bound; here, the rotary embedding."""
        self.rope = self.read_rope()
        self.attention_scale = 1 / math.sqrt(self.config.head_dim)

    def rope_factors(self) -> Float32Array | None:
        """What the rotary frequencies are divided by, float32 [rotary_pairs], or None."""
        return self.vector("rope_freqs")

    def leaves(self, name: str) -> bool:
        """Whether a tensor that the formula has no place for is left in the file: part of what prefill does not use.

        Here, the blocks after the last layer, which predict further tokens (multi-token prediction, arXiv 2404.19737),
        and what sees or hears, where a file has it beside the language model (Ollama's files do).
        """
        if name.startswith(TOWERS):
            return True
        block = name.split(".")[1] if name.startswith("blk.") else ""
        extra = range(self.config.block_count, self.config.block_count + self.config.nextn_predict_layers)
        return block.isdecimal() and int(block) in extra

    def window(self, index: int) -> int | None:
        """How many tokens a query of that layer sees, itself the last; None where it sees all."""
        return None

    def head_dims(self, index: int) -> tuple[int, int]:
        """The size of a layer's heads in its attention: of queries and keys, and of values."""
        return self.config.head_dim, self.config.head_dim

    @cached_property
    def all_head_dims(self) -> tuple[tuple[int, int], ...]:
        """The head_dims that there are, each once."""
        return tuple(dict.fromkeys(self.head_dims(index) for index in range(self.config.block_count)))

    def residual_shape(self, tokens: int) -> tuple[int, ...]:
        """The shape of the residual stream between layers, of a batch of so many tokens."""
        return tokens, self.config.embedding_length

    def embed(self, ops: Ops) -> Residual:
        """The residual stream before the first layer."""
        return ops.embed(self.token_embd)

    @abstractmethod
    def layer(self, ops: Ops, w: Weights, x: Residual, index: int) -> Residual:
        """One layer: w its weights, x the residual stream. Returns the new residual stream."""

    def head(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        """The logits, after the last layer (see Ops.head)."""
        return ops.head(x, self.output_norm, self.output, logits)

    # ------------------------------------------------------------------------------------------------------------------

    def forward(
        self, ops: Ops, progress: Progress = no_progress, layers: range | None = None, x: Residual | None = None
    ) -> Residual:
        """The whole batch through the layers, one layer after another, so that each weight is visited once.

        layers: the ones that are gone through, all of them unless given; x: the residual stream before the first of
        these, where it is not the model's first. Returns the residual stream after the last of them.
        """
        layers = layers or range(len(self.blocks))
        if x is None:
            x = self.embed(ops)
        elif self.row_table() is not None:
            self.embed(ops)  # for what the layers take of the embedding beside the residual stream
        for index in layers:
            ops.begin_layer(index)
            x = self.layer(ops, self.blocks[index], x, index)
            progress("prefill", index + 1, len(self.blocks))
        return x

    def may_part(self, index: int) -> bool:
        """Whether the layers before that one and those from it on may run on two devices: none of these sees keys and
        values of those."""
        shared = ((at, part) for at, part in self.state_parts() if isinstance(part, SharedKeysValues))
        return not any(part.layer < index <= at for at, part in shared)

    def finish(self, ops: Ops, x: Residual, logits: Logits) -> PendingHead:
        """What comes after the last layer: the logits that are asked for, or each segment's vector."""
        return ops.pool(x, self.output_norm) if logits == "pooled" else self.head(ops, x, logits)

    @cached_property
    def int8_norms(self) -> frozenset[str]:
        """Vectors that may be norms whose outputs nobody reads but matrices in int8, where the model is opened so."""
        return frozenset(name for block in self.blocks for name in norms_for_int8(block))

    @cached_property
    def layer_states(self) -> tuple[LayerState, ...]:
        """What each layer of an opened family keeps of a sequence, so that the sequence can be continued."""
        return tuple(self.state(index) for index in range(self.config.block_count))

    @property
    def recurrence(self) -> DeltaNet | KimiDelta | Mamba2 | None:
        """The recurrence that some layers are, where they are more than a convolution."""
        return None

    @cached_property
    def has_recurrence(self) -> bool:
        """Whether any of its layers keeps the state of a recurrence."""
        return any(isinstance(part, Recurrent) for _, part in self.state_parts())

    def state_parts(self) -> Iterator[tuple[int, LayerState]]:
        """Each layer's number with each of its states of one kind."""
        return ((index, part) for index, state in enumerate(self.layer_states) for part in state.parts)

    def state(self, index: int) -> LayerState:
        """What one layer keeps of a sequence; here, keys and values."""
        return KeysValues(self.config.head_count_kv, self.config.head_dim, self.window(index))

    def tensor_shapes(self) -> Shapes:
        """Every tensor that a file of this model may have, in a file's usual order: full GGUF name -> shape.

        A trailing `?` marks one that may be absent, as every bias may.
        """
        return self._tensor_shapes(self.block_shapes(index) for index in range(self.config.block_count))

    def matrices(self) -> list[Weight]:
        """Every matrix of the model that something is multiplied by (experts' are one under another), and the
        embedding; a tied output counts once."""
        every = (self.token_embd, self.output, *self.other_matrices(), *(w for block in self.blocks for w in block))
        by_name = {w.name: w for w in every if w.is_matrix}
        return list(by_name.values())

    def read_rope(self, *, base: float | None = None, scaled: bool = True) -> Rope:
        """The rotary embedding that the file describes; base and scaled as for kqprefill.models.config.read_rope."""
        return read_rope(
            self.meta,
            self.config.head_dim,
            interleaved=self.rope_interleaved,
            base=base,
            scaled=scaled,
            factors=self.rope_factors(),
        )

    def vector(self, name: str) -> Float32Array | None:
        """The values of a vector outside the blocks, float32 [n]; None where the file does not have it."""
        weight = self.shared.get(name)
        return None if weight is None else dequantize(weight.tensor.data, weight.tensor.type)

    def _bind(self, file: ModelFile) -> None:
        self.file = file
        self.shared = Weights(file, "", self.shared_shapes())
        self.token_embd = Weight(self.shared.token_embd.tensor)  # without a bias: see tensor_shapes
        self.output_norm: Weight = getattr(self.shared, self.last_norm.rstrip("+"))
        self.output = self.shared.get("output") or self.token_embd
        blocks = [self._block_in_file(index) for index in range(self.config.block_count)]
        self.blocks = [Weights(file, f"blk.{i}.", shapes, parts) for i, (shapes, parts) in enumerate(blocks)]
        self._refuse_unknown_tensors(self._tensor_shapes(shapes for shapes, _ in blocks))

    def _block_in_file(self, index: int) -> tuple[Shapes, Parts]:
        """A block's shapes and parts: those of the family, but that the file may have q, k and v as one matrix
        (attn_qkv, which llama.cpp's converter writes with --fuse-qkv); k and v also where a layer sees another's."""
        shapes, parts = self.block_shapes(index), self.block_parts(index)
        plain = {name.rstrip("?"): shape for name, shape in shapes.items()}
        if f"blk.{index}.attn_qkv.weight" not in self.file.tensors or "attn_qkv" in plain or "attn_q" not in plain:
            return shapes, parts
        rows: dict[str, int] = {n: plain[n][0] for n in ("attn_q", "attn_k", "attn_v") if n in plain}
        height, state = sum(rows.values()), None if "attn_k" in rows else self.state(index)
        if isinstance(state, SharedKeysValues):
            height += 2 * self.block_shapes(state.layer)["attn_k"][0]  # left in the file
        elif len(rows) < 3:
            return shapes, parts
        others = {name: shape for name, shape in shapes.items() if name.rstrip("?") not in rows}
        return {**others, "attn_qkv": (height, plain["attn_q"][1])}, {**parts, "attn_qkv": {**rows}}

    def _tensor_shapes(self, blocks: Iterable[Shapes]) -> Shapes:
        """As tensor_shapes, of blocks with those shapes."""
        shapes = _file_shapes("", self.shared_shapes())
        del shapes["token_embd.bias?"]  # its rows are looked up as they are
        for index, block in enumerate(blocks):
            shapes |= _file_shapes(f"blk.{index}.", block)
        return shapes

    def _refuse_unknown_tensors(self, shapes: Shapes) -> None:
        """A tensor that the formula has no place for means another model than the one we would compute."""
        tensors = self.file.tensors
        known = {name.rstrip("?") for name in shapes}
        if self.output is self.token_embd:
            known.remove("output.bias")  # there is no output matrix that it could belong to
        unknown = [name for name in tensors if name not in known and not self.leaves(name)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise self.meta.error(f"tensor {unknown[0]}{more} has no place in this family as kqprefill knows it")


def _file_shapes(prefix: str, shapes: Shapes) -> Shapes:
    """Those shapes by their tensors' names in a file, and the biases that belong to them."""
    named: Shapes = {}
    for declared, shape in shapes.items():
        name, bias, optional = tensor_names(declared, shape)
        named[f"{prefix}{name}{'?' * optional}"] = shape
        if bias is not None:
            named[f"{prefix}{bias}?"] = bias_shape(shape)
    return named
