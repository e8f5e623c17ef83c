"""What a model family is: the shapes of its tensors, and what one layer does.

A family's page calls the ops of `kqprefill.backends.base.Ops` and reads like the model's formula; both backends run it.
"""

from functools import cached_property
import math

from ..errors import ModelError
from ..gguf import dequantize
from .config import ArchMetadata, Config, read_rope
from .weights import Weight, Weights


class Family:
    """A decoder-only transformer over a GGUF file; subclasses say what differs.

    Attributes: config; blocks (Weights of each layer); token_embd, output_norm, output (Weight; a file without an
    output matrix uses the embedding's, "tied").
    """

    architecture = ""  # general.architecture
    has_experts = False  # whether layers call Ops.moe
    rope_interleaved = False  # which elements pair up; see Rope

    def __init__(self, file):
        """Raises ModelError: a tensor missing, misshapen or of an unsupported type, or metadata that contradicts."""
        self.file = file
        self.meta = ArchMetadata(file, self.architecture)
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
        self.config = c = Config.from_gguf(self.meta, vocab_size=embedding.shape[0])
        if c.block_count > len(file.tensors):
            raise self.meta.error(f"block_count is {c.block_count}, but the file has only {len(file.tensors)} tensors")
        matrix = (c.vocab_size, c.embedding_length)
        pairs = self.meta.integer("rope.dimension_count", c.head_dim) // 2
        shapes = {
            "token_embd": matrix,
            "output_norm": (c.embedding_length,),
            "output?": matrix,
            "rope_freqs?": (pairs,),
            **self.more_shapes(pairs),
        }
        shared = Weights(file, "", shapes)
        self.token_embd, self.output_norm = Weight(shared.token_embd.tensor), shared.output_norm  # a row has no bias
        self.shared = shared
        self.output, self.rope_freqs = shared.get("output") or self.token_embd, shared.get("rope_freqs")
        shapes, parts = self.block_shapes(), self.block_parts()
        self.blocks = [Weights(file, f"blk.{i}.", shapes, parts) for i in range(c.block_count)]
        self._refuse_unknown_tensors(shared)
        self.read_hyper_parameters()

    # What a family overrides -----------------------------------------------------------------------------------------

    def block_shapes(self):
        """GGUF tensor name within a block -> shape; a `?` marks one that may be absent."""
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

    def more_shapes(self, pairs):
        """Tensors beside the blocks' that only this family has, like block_shapes; pairs: that rotary embedding turns."""
        return {}

    def block_parts(self):
        """Matrices that this family keeps one under another: GGUF tensor name -> {name of the part: rows}."""
        return {}

    def read_hyper_parameters(self):
        """Read what the layers need beyond Config; here, the rotary embedding."""
        self.rope = self.read_rope()
        self.attention_scale = 1 / math.sqrt(self.config.head_dim)

    def embed(self, ops, tokens):
        return ops.embed(self.token_embd, tokens)

    def head(self, ops, x, logits):
        """The last op: HeadResult (see Ops.head)."""
        return ops.head(x, self.output_norm, self.output, logits)

    def layer(self, ops, w, x, index):
        """One layer: w its Weights, x the residual stream. Returns the new residual stream."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------

    @cached_property
    def products(self):
        """[(weights, gated)] of the matrix products, one of each kind (types and shapes): matrices multiplied side by side, or
        gate and up; experts' have three dimensions. For compiling ahead."""
        kinds = {}
        for weights, gated in self._every_product():
            kind = gated, weights[0] is self.output, *((w.tensor.type, w.shape) for w in weights)
            kinds.setdefault(kind, (weights, gated))
        return list(kinds.values())

    def _every_product(self):
        for w in self.blocks:
            yield (w.attn_q, w.attn_k, w.attn_v), False
            yield (w.attn_output,), False
            if self.has_experts:
                yield (w.ffn_gate_inp,), False
            for kind in ("", "_exps", "_shexp"):
                if w.get(f"ffn_gate{kind}"):
                    yield (w.get(f"ffn_gate{kind}"), w.get(f"ffn_up{kind}")), True
                    yield (w.get(f"ffn_down{kind}"),), False
        yield (self.output,), False

    def matrices(self):
        """Every matrix of the model (Weight; experts' are one under another), a tied output counted once."""
        found = {w.name: w for w in (self.token_embd, self.output, *(w for block in self.blocks for w in block))}
        return [w for w in found.values() if len(w.shape) >= 2]

    def read_rope(self, **options):
        interleaved, factors = self.rope_interleaved, self.rope_factors()
        return read_rope(self.meta, self.config.head_dim, interleaved=interleaved, factors=factors, **options)

    def rope_factors(self):
        """What the rotary frequencies are divided by, float32 [pairs], or None."""
        return self.rope_freqs and dequantize(self.rope_freqs.tensor.data, self.rope_freqs.tensor.type)

    def _refuse_unknown_tensors(self, shared):
        """A tensor that the formula has no place for means another model than the one we would compute."""
        known = set().union(*(weights.tensor_names for weights in (shared, *self.blocks)))
        known.discard("token_embd.bias")  # a row has none
        unknown = [name for name in self.file.tensors if name not in known]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise self.meta.error(f"tensor {unknown[0]}{more} has no place in this family as kqprefill knows it")
