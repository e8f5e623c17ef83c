"""What a backend gives: the ops that a family's page calls, for one batch at a time.

Shapes: T tokens in the batch, H embedding_length, F feed_forward_length, V vocab_size, D head_dim, nq and nkv heads.
The residual stream x and every op's sums are float32. What an op returns is the backend's own array type, good until
the next layer; a family only hands it on.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
import math

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Rows of a batch that follow one another in a sequence: `length` from row `first` on, at `position` and on.

    after: which of the batch's segments holds the tokens before these, all of them, from the sequence's first on; None where
    there are none or a cache has them. Several may come after the same one.
    """

    first: int
    length: int
    position: int = 0
    after: int | None = None

    @property
    def rows(self):
        return slice(self.first, self.first + self.length)


@dataclass(frozen=True)
class Targets:
    """Whose log-probabilities are asked for: token tokens[i], coming after row rows[i] of the batch; int32 [S] each. top: how
    many of the likeliest tokens there are to be named as well."""

    rows: np.ndarray
    tokens: np.ndarray
    top: int = 0


@dataclass(frozen=True)
class Batch:
    """The tokens of one prefill: int32 [T], one after another those of each segment; without segments, of one sequence from
    position `start` on (the seed's pos_start). Tokens see those before them in their sequence alone."""

    tokens: np.ndarray
    start: int = 0
    segments: tuple = ()
    targets: Targets | None = None

    def __post_init__(self):
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(0, len(self.tokens), self.start),))

    @property
    def positions(self):
        """int32 [T]"""
        return np.concatenate([np.arange(s.position, s.position + s.length, dtype=np.int32) for s in self.segments])


@dataclass(frozen=True)
class HeadResult:
    """The last position's greedy token, its logit and natural log-probability; and the logits asked for, float32
    [V] or [T, V], or None."""

    token: int
    logit: float
    logprob: float
    logits: np.ndarray | None


@dataclass(frozen=True)
class Ranks:
    """What was asked for by Targets: natural log-probabilities, float32 [S], NaN where a logit is; and the likeliest tokens, the
    lowest ids of equals first, int32 [S, top], with theirs, float32 [S, top]."""

    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


class Ops(ABC):
    """The operations of one batch. `layer` says which layer is running; it chooses the cache's slice.

    timeline: a Timeline that hears which stage each op belongs to, or None.
    """

    layer = 0
    timeline = None

    def begin_layer(self, index):
        """The ops that follow are this layer's."""
        self.layer = index

    def enter(self, stage, matrices=(), rows=0):
        """What follows belongs to this stage: `rows` rows through these matrices (Weights), if any."""
        if self.timeline is not None:
            flops = sum(2 * rows * math.prod(w.shape) for w in matrices)
            self.timeline.enter(stage, flops, sum(w.tensor.nbytes for w in matrices))

    def enter_attention(self, window):
        """What follows is a layer's attention over this batch."""
        if self.timeline is not None:
            seen = self.batch.positions.astype(np.int64) + 1
            seen = seen if window is None else np.minimum(seen, window)
            self.timeline.enter("attention", 4 * self.config.q_width * int(seen.sum()))

    @abstractmethod
    def embed(self, weight, tokens, scale=1.0):
        """x[t] = scale * weight[tokens[t]]; float32 [T, H]."""

    @abstractmethod
    def rms_norm(self, x, weight):
        """x / sqrt(mean(x²) + eps) * weight over each row (arXiv 1910.07467), as the input of a matrix: [T, H]."""

    @abstractmethod
    def cast(self, x):
        """The residual stream as it is, as the input of a matrix: for families that normalise only what is added to it
        (`add_rms_norm`)."""

    @abstractmethod
    def add_rms_norm(self, x, y, weight):
        """x + rms_norm(y, weight), float32 [T, H]; x's storage may be reused."""

    @abstractmethod
    def qkv(self, h, wq, wk, wv, *, rope, q_norm=None, k_norm=None):
        """h through three matrices and their biases, q and k RMS-normalised where a norm is given (head by head, or over all
        heads: its length says which), then rotated unless rope is None (arXiv 2104.09864): q [T, nq, D], k and v [T, nkv, D]."""

    @abstractmethod
    def attention(self, q, k, v, *, scale, window=None, softcap=None, sinks=None):
        """Causal grouped-query attention, softmax(scale * q·kᵀ)·v, over the cache's tokens and the batch's own.

        window: a query sees that many tokens, itself the last (None: all). softcap: scores s become
        softcap * tanh(s / softcap) (arXiv 2408.00118). sinks: a vector [nq], a score of each head that takes a share of the
        softmax and gives no value (arXiv 2309.17453). Returns [T, nq * D] as a matrix's input.
        """

    @abstractmethod
    def linear(self, a, weight, residual=None, scale=1.0):
        """scale * (a · Wᵀ + bias) (+ residual), float32 [T, rows]; residual's storage may be reused. A scale other than 1 is
        for matrices without a bias."""

    @abstractmethod
    def mlp(self, h, gate, up, down, *, activation, residual=None, scale=1.0):
        """scale * down(act(gate(h)) * up(h)) (+ residual), float32 [T, H] (arXiv 2002.05202); scale as in `linear`.

        activation: "silu" or "gelu_tanh" (ggml_silu, ggml_gelu).
        """

    @abstractmethod
    def moe(self, h, w, experts, *, activation, residual):
        """residual + the mean of the used experts' feed-forward networks (each as `mlp`), weighted by their shares, float32 [T, H].

        w: Weights with ffn_gate_inp, the router, and ffn_gate_exps, ffn_up_exps and ffn_down_exps. experts: how they are
        routed (kqprefill.models.experts.Experts). activation: also "swiglu_oai" (ggml_swiglu_oai with 1.702 and 7).
        """

    @abstractmethod
    def add_gated(self, x, y, h, weight):
        """x + sigmoid(h · weight) * y, float32 [T, H]; weight: a vector [H]. x's storage may be reused."""

    @abstractmethod
    def head(self, x, norm, output, logits, scale=1.0, softcap=None):
        """rms_norm, the output matrix, the greedy token (ties to the lowest id). Logits are multiplied by scale, and y becomes
        softcap * tanh(y / softcap). logits: which to return, None, "last" or "all"; or "ranks", what the batch's targets ask for.

        Returns HeadResult, on the host; raises BackendError if a logit that decides the token is NaN. For "ranks" a function
        that waits for Ranks, to be called before the next but one batch is run.
        """


class Cache(ABC):
    """Keys and values of `length` tokens of one sequence, with room for `capacity`."""

    def __init__(self, capacity):
        self.capacity, self.length = capacity, 0

    def reset(self):
        """Forget all tokens."""
        self.length = 0

    @abstractmethod
    def close(self):
        """Free the storage."""


class Backend(ABC):
    """A device that can run a model. `name` is "cpu" or "cuda"; `device_name` is for people; `plan` says what of the model
    stays in the device's memory (kqprefill.backends.cuda.residency.Plan), None where that means nothing."""

    name = device_name = ""
    plan = None

    @abstractmethod
    def load(self, model, progress, vram=None, tokens=None, ranks=False):
        """Make the model's weights ready (a no-op on the CPU); progress(stage, done, total) hears how far it is.

        vram: a Budget (kqprefill.backends.budget) of device memory, None for all that is free; tokens: of the longest
        prompt, or (ranks) of the largest batch with targets, to plan for. Raises BackendError where the model cannot run
        within it.
        """

    @abstractmethod
    def new_cache(self, model, capacity):
        """A Cache for `capacity` tokens."""

    @abstractmethod
    def run(self, model, batch, cache, logits, forward, progress, timed=False):
        """Run one batch: x = forward(ops), then the head, asked for `logits` (see Ops.head).

        Returns what the head gives, and {name: Stage} if timed, else None.

        forward(ops) calls each layer's ops, the same calls for the same batch length; progress(stage, done, total) hears
        of what a backend does before (compiling).
        """

    def floors(self, model):
        """[(what, function of a prompt's tokens)]: seconds that a prompt takes at least, as far as known."""
        return []

    def memory_used(self):
        """Bytes of device memory held, or None where that means nothing."""
        return None

    def close(self):
        """Free everything."""
