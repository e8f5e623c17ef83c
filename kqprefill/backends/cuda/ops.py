"""The ops on a GPU: each launches its kernels and returns at once; only `head` waits.

Operands of the matrix units are halves under power-of-two scales that bounds prove safe (kernels/scales.cu); the
residual stream and all sums are float32.
"""

from ctypes import c_float as f32, c_int32 as i32
from dataclasses import dataclass, replace
import math

import numpy as np

from ...errors import BackendError
from ..base import HeadResult, Ops, Ranks
from .experts import EXPERTS, ExpertOps
from .gemm import ACTIVATIONS, Gemms, Operand
from .kernels import COMMON, weight_program
from .packing import lay_out
from .staging import repack
from .tensor_maps import TensorMaps
from .tiles import TILE_ROWS, HopperAttentionTile, attention_tile, padded
from .weights import Matrix

NORM, ROPE, SCALES, HEAD = COMMON

_TILE_TOKENS = 16384  # tokens whose q/k/v sums, or gate and up, exist at a time
# Tokens. Blocks that start early gather on the first multiprocessors that have room: no matter where there are many more than
# these, but a small launch should spread over all (an H100 at 16 tokens: 3.6 ms without, 5.0 ms with).
_OVERLAP_FROM = 257
_LOGITS_BYTES = 320 << 20  # of logits on the device at a time
_ROTATION_GROWTH = 1.5  # rotating a pair lengthens neither, but may turn it onto one axis: sqrt(2), rounded up
_RANKED = np.dtype([("token", np.int32), ("logit", np.float32), ("logprob", np.float32)])  # head.cu's struct


@dataclass(frozen=True)
class Heads:
    """q, k or v: halves [tokens, heads, head_dim padded to 16], holding values times *scale."""

    address: int
    scale: int


class CudaOps(ExpertOps, Ops):
    def __init__(self, backend, config, batch, cache):
        self.gpu, self.kernels, self.weights = backend.gpu, backend.kernels, backend.weights
        self.config, self.batch, self.cache = config, batch, cache
        self.work, self.downloads = backend.workspace, backend.downloads
        self.n = len(batch.tokens)
        self.kernels.overlap = self.gpu.capability >= (9, 0) and self.n >= _OVERLAP_FROM
        self.maps = TensorMaps(self.gpu, self.weights) if backend.hopper else None
        self.gemms = Gemms(self.gpu, self.kernels, self.work, self.maps)
        self.attention_tile = attention_tile(config.head_dim, backend.hopper)
        # All that goes up: the ops themselves only launch, so that they can be captured as a graph.
        self.tokens = self._upload("tokens", batch.tokens)
        self.positions = self._upload("positions", batch.positions)
        layout = lay_out(batch.segments, self.attention_tile)
        self.kv_rows, self.n_tiles, self.n_copies = layout.rows, len(layout.tiles), len(layout.copies)
        self.tiles = self._upload("tiles", layout.tiles)
        self.kv_row_of, self.copies = (
            (self._upload("kv rows", layout.row_of), self._upload("kv copies", layout.copies))
            if self.n_copies
            else (0, 0)
        )
        if batch.targets is not None:
            self.target_rows = self._upload("target rows", batch.targets.rows)
            self.target_tokens = self._upload("targets", batch.targets.tokens)
        self._tables = {}

    def begin_layer(self, index):
        super().begin_layer(index)
        if self.weights.streaming:
            self.enter("streaming")
            self.weights.begin_layer(index)
        if self.cache is not None:
            self.cache.begin_layer(index, self.batch.start, self.n)
            self.kernels.fence()

    def prepare(self, family, logits, progress):
        """Compile what this batch's matrix products need, all at once, before the first of them is launched."""
        programs = {}
        lengths = {self.n, min(self.n, _TILE_TOKENS), self.n % _TILE_TOKENS} - {0}
        for weights, gated in family.products:
            matrices, experts, rows = [self.weights.matrix(w) for w in weights], 0, lengths
            if weights[0] is family.output:
                count, most = self.positions_of(logits), self._head_rows(matrices[0].rows, logits)
                rows = {most, count % most} - {0}
            elif len(weights[0].shape) == 3:
                experts, rows = family.experts.count, self.expert_rows(family.experts)
                matrices = [replace(matrix, rows=matrix.rows // experts) for matrix in matrices]
            gemm = self.gemms.choose(matrices, gated)
            for m in rows:
                programs.update(dict.fromkeys(gemm.programs(m, matrices, gated, experts)))
        if family.has_experts:
            programs[EXPERTS] = None
        self.kernels.prepare(programs, progress)

    # the residual stream ----------------------------------------------------------------------------------------------

    def embed(self, weight, tokens, scale=1.0):
        self.enter("rest")
        columns = weight.shape[1]
        x = self.work.get("residual", 4 * self.n * columns)
        self._embedding, self._added = (weight, scale), 0.0
        if not self.weights.on_host(weight):
            self._embed(self.weights.matrix(weight), self.tokens, self.n, scale, x)
            return x
        # The rows of this prompt's tokens alone, as a matrix of their own.
        most = min(self.n, _TILE_TOKENS)
        numbers = self._upload("row numbers", np.arange(most, dtype=np.int32))
        for t in range(0, self.n, most):
            m = min(most, self.n - t)
            matrix = Matrix(weight.name, weight.tensor.type, 0, m, columns)
            matrix = replace(matrix, address=self.work.get("embedding", matrix.nbytes))
            rows = self.weights.host_rows(weight, self.batch.tokens[t : t + m])
            repack(self.kernels, matrix, 0, m, rows.shape[1], self._upload("embedding rows", rows))
            self._embed(matrix, numbers, m, scale, x + 4 * t * columns)
        return x

    def _embed(self, matrix, tokens, n, scale, out):
        self.kernels.launch(
            weight_program(matrix.type),
            "embed",
            n,
            256,
            matrix.address,
            i32(matrix.units),
            i32(matrix.columns),
            tokens,
            f32(scale),
            out,
        )

    def rms_norm(self, x, weight, rows=None, picked=0):
        """rows: how many, the first of x's or (picked: device address of int32 row numbers) any; all unless given."""
        self.enter("rest")
        vector, host = self.weights.vector(weight.tensor)
        columns = len(host)
        rows = self.n if rows is None else rows
        out = self.work.get("normed", 2 * rows * padded(columns))
        scale = self.weights.constant_scale(math.sqrt(columns) * np.abs(host).max())
        self.kernels.launch(
            NORM,
            "rms_norm",
            rows,
            256,
            x,
            vector,
            out,
            i32(columns),
            i32(padded(columns)),
            f32(self.config.rms_epsilon),
            scale,
            picked,
        )
        return Operand(out, columns, scale, rows, vector, math.sqrt(columns))

    def cast(self, x):
        self.enter("rest")
        columns = self.config.embedding_length
        out = self.work.get("normed", 2 * self.n * padded(columns))
        scale = self.weights.constant_scale(self._largest)
        self.kernels.launch(NORM, "cast", self.n, 256, x, out, i32(columns), i32(padded(columns)), scale)
        return Operand(out, columns, scale, self.n, None, math.sqrt(columns) * self._largest)

    def add_rms_norm(self, x, y, weight):
        self.enter("rest")
        vector, host = self.weights.vector(weight.tensor)
        self._added += math.sqrt(len(host)) * float(np.abs(host).max())
        self.kernels.launch(
            NORM, "add_rms_norm", self.n, 256, x, y, vector, i32(len(host)), f32(self.config.rms_epsilon)
        )
        return x

    # attention --------------------------------------------------------------------------------------------------------

    def qkv(self, h, wq, wk, wv, *, rope, q_norm=None, k_norm=None):
        c, n, matrices = self.config, self.n, [self.weights.matrix(w) for w in (wq, wk, wv)]
        width = c.q_width + 2 * c.kv_width
        biases = [w.bias for w in (wq, wk, wv)]
        bias = 0
        if any(biases):
            bias, _ = self.weights.vector(*(b or m.rows for b, m in zip(biases, matrices)))
        sums = self.work.get("qkv", 4 * min(n, _TILE_TOKENS) * width)
        padded_dim = self.attention_tile.head_dim
        q_row, kv_row = (2 * heads * padded_dim for heads in (c.head_count, c.head_count_kv))
        q = self.work.get("q", n * q_row)
        k, v = self._kv_addresses()
        start = self.batch.start if self.cache is not None else 0
        norms = [
            self.weights.vector(w.tensor)[0] if w is not None and w.shape == (c.head_dim,) else 0
            for w in (q_norm, k_norm)
        ]
        pairs = rope.width // 2 if rope is not None else 0
        growth = _ROTATION_GROWTH * rope.magnitude if rope is not None else 1.0
        growths = growth * (float(rope.temperature(c.context_length)) if rope is not None else 1.0), growth, 1.0
        heads = c.head_count + 2 * c.head_count_kv
        for t in range(0, n, _TILE_TOKENS):
            m = min(_TILE_TOKENS, n - t)
            self.enter("linear", [wq, wk, wv], m)
            self._multiply(h.rows_from(t), matrices, sums, m, bias)
            self.enter("rest")
            for norm, at in ((q_norm, 0), (k_norm, 4 * c.q_width)):  # over all heads
                if norm is not None and norm.shape != (c.head_dim,):
                    self.kernels.launch(
                        NORM,
                        "rms_norm_in_place",
                        m,
                        256,
                        sums + at,
                        self.weights.vector(norm.tensor)[0],
                        i32(norm.shape[0]),
                        i32(width),
                        f32(c.rms_epsilon),
                    )
            scales = [
                self._rotated_scale(h, w, b, norm, g)
                for w, b, norm, g in zip(matrices, biases, (q_norm, k_norm, None), growths)
            ]
            # Of a batch whose rows of k and v are in another order than its tokens, the kernel looks them up.
            to = q + t * q_row, *(x if self.n_copies else x + (start + t) * kv_row for x in (k, v))
            self.kernels.launch(
                ROPE,
                "rotate_qkv",
                (m, -(-heads // 8)),
                256,
                sums,
                *to,
                i32(c.head_count),
                i32(c.head_count_kv),
                i32(c.head_dim),
                i32(padded_dim),
                *norms,
                f32(c.rms_epsilon),
                self._rope_table(rope) + 8 * t * pairs if pairs else 0,
                i32(pairs),
                i32(pairs > 0 and rope.interleaved),
                *scales,
                self.kv_row_of and self.kv_row_of + 4 * t,
                self.positions + 4 * t,
                f32(rope.beta if pairs else 0.0),
                i32(rope.beta_length if pairs else 1),
            )
        if self.n_copies:
            self.kernels.launch(ROPE, "copy_rows", self.n_copies, 128, k, v, i32(kv_row // 16), self.copies)
        return Heads(q, scales[0]), Heads(k, scales[1]), Heads(v, scales[2])

    def attention(self, q, k, v, *, scale, window=None, softcap=None, sinks=None):
        self.enter_attention(window)
        c, tile = self.config, self.attention_tile
        out = self.work.get("attended", 2 * self.n * padded(c.q_width))
        inputs = q.address, k.address, v.address
        if isinstance(tile, HopperAttentionTile):
            kv_rows = self.kv_rows if self.cache is None else self.cache.capacity
            q_map = self.maps.of(q.address, c.head_count * tile.head_dim, self.n, tile.block_q)
            kv_width = c.head_count_kv * tile.head_dim
            inputs = q_map, *(self.maps.of(x.address, kv_width, kv_rows, tile.block_kv) for x in (k, v))
        self.kernels.launch(
            tile.program,
            "attention",
            (c.head_count, self.n_tiles),
            tile.threads,
            *inputs,
            out,
            self.tiles,
            i32(c.head_count),
            i32(c.head_count_kv),
            i32(c.head_dim),
            i32(padded(c.q_width)),
            f32(scale),
            q.scale,
            k.scale,
            i32(window or 0),
            f32(softcap or 0.0),
            self.weights.vector(sinks.tensor)[0] if sinks is not None else 0,
            shared_bytes=tile.shared_bytes,
        )
        return Operand(out, c.q_width, v.scale, self.n)

    def _rotated_scale(self, h, matrix, bias, norm, growth):
        """The scale of q, k or v, which may grow by a factor: bounded by its norm where it has one, else by its matrix's rows,
        already measured."""
        if norm is not None:
            _, host = self.weights.vector(norm.tensor)
            return self.weights.constant_scale(math.sqrt(len(host)) * np.abs(host).max() * growth)
        bias_address = self.weights.vector(bias)[0] if bias is not None else 0
        return self._output_scale(matrix.name, matrix.rows, growth * h.gain, matrix, bias_address)

    def _kv_addresses(self):
        c = self.config
        if self.cache is not None:
            return self.cache.addresses(self.layer)
        nbytes = 2 * self.kv_rows * c.head_count_kv * self.attention_tile.head_dim
        return self.work.get("k", nbytes), self.work.get("v", nbytes)

    def _rope_table(self, rope):
        if id(rope) not in self._tables:
            pairs = rope.width // 2
            half_turns = self.weights.constant(rope.inv_freq / math.pi)
            table = self.work.get(f"rope {len(self._tables)}", 8 * self.n * pairs)
            self.kernels.launch(
                ROPE,
                "rope_table",
                -(-self.n * pairs // 256),
                256,
                self.positions,
                half_turns,
                i32(self.n),
                i32(pairs),
                f32(rope.magnitude),
                table,
            )
            self._tables[id(rope)] = table
        return self._tables[id(rope)]

    # matrices ---------------------------------------------------------------------------------------------------------

    def linear(self, a, weight, residual=None, scale=1.0):
        self.enter("linear", [weight], self.n)
        matrix = self.weights.matrix(weight)
        out = residual if residual is not None else self.work.get("linear", 4 * self.n * matrix.rows)
        self._multiply(self._scaled(a, scale), [matrix], out, self.n, self._bias(weight), add=residual is not None)
        return out

    def mlp(self, h, gate, up, down, *, activation, residual=None, scale=1.0):
        self.enter("linear", [gate, up, down], self.n)
        g, u, d = (self.weights.matrix(w) for w in (gate, up, down))
        biases = self._bias(gate), self._bias(up)
        out = residual if residual is not None else self.work.get("linear", 4 * self.n * d.rows)
        w_scale = self._weight_scale([g, u], h)
        act_scale = self._gated_scale(activation, h.gain, g, u, biases)
        for t in range(0, self.n, _TILE_TOKENS):
            m = min(_TILE_TOKENS, self.n - t)
            act = Operand(self.work.get("activated", 2 * m * padded(g.rows)), g.rows, act_scale, m)
            gemm = self.gemms.choose([g, u], gated=True)
            gemm.gated(h.rows_from(t), g, u, act, m, w_scale, biases, ACTIVATIONS[activation])
            at = 4 * t * d.rows
            self._multiply(self._scaled(act, scale), [d], out + at, m, self._bias(down), add=residual is not None)
        return out

    def _multiply(self, a, matrices, out, m, bias=0, add=False):
        """out[:m] = a · [matrices, one under another]ᵀ + bias (+ out[:m], if add)."""
        gemm = self.gemms.choose(matrices)
        gemm.linear(a, matrices, out, m, self._weight_scale(matrices, a), bias, add)

    def _scaled(self, a, factor):
        """The same operand, said to be scaled such that products come out times `factor`."""
        if factor == 1.0:
            return a

        def make(address):
            self.kernels.launch(SCALES, "divide_scale", 1, 1, a.scale, f32(factor), address)

        return replace(a, scale=self.weights.scale(("divided", a.scale, factor), make))

    @property
    def _largest(self):
        """No value of the residual stream is larger: known where only norms' outputs are added to the embedding."""
        weight, scale = self._embedding
        return abs(scale) * self.weights.absmax(weight) + self._added

    def _bias(self, weight):
        return self.weights.vector(weight.bias)[0] if weight.bias is not None else 0

    # scales, made on the device the first time a matrix is used -------------------------------------------------------

    def _weight_scale(self, matrices, a):
        """The scale of the halves of these matrices; also measures their rows against the norm of their input."""

        def make(address):
            absmax = self.work.get("absmax", 4)
            self.gpu.zero(absmax, 4)
            for matrix in matrices:
                self.kernels.launch(
                    weight_program(matrix.type),
                    "measure",
                    matrix.row_tiles,
                    8 * TILE_ROWS,
                    matrix.address,
                    i32(matrix.units),
                    i32(matrix.rows),
                    i32(matrix.columns),
                    a.norm or 0,
                    self._row_norms(matrix),
                    absmax,
                )
            self.kernels.launch(SCALES, "weight_scale", 1, 1, absmax, address)

        return self.weights.scale(("weights", *(m.name for m in matrices)), make)

    def _output_scale(self, name, n, gain, a, bias_a, b=None, bias_b=0):
        def make(address):
            self.kernels.launch(
                SCALES,
                "output_scale",
                1,
                256,
                self._row_norms(a),
                bias_a,
                self._row_norms(b) if b else 0,
                bias_b,
                i32(n),
                f32(gain),
                address,
            )

        return self.weights.scale(("output", name), make)

    def _gated_scale(self, activation, gain, gate, up, biases):
        """The scale of act(gate) * up."""
        if activation == "swiglu_oai":  # clamped: at most 7 * (7 + 1)
            return self.weights.constant_scale(56.0)
        return self._output_scale(gate.name, gate.rows, gain, gate, biases[0], up, biases[1])

    def _row_norms(self, matrix):
        return self.work.get(f"row norms {matrix.name}", 4 * matrix.rows)

    # the end ----------------------------------------------------------------------------------------------------------

    def head(self, x, norm, output, logits, scale=1.0, softcap=None):
        count = self.positions_of(logits)
        self.enter("head", [output], count)
        matrix, hidden = self.weights.matrix(output), self.config.embedding_length
        vocab, top, first = matrix.rows, 1, self.n - count
        most = self._head_rows(vocab, logits)
        device = self.work.get("logits", 4 * most * vocab)
        if logits == "ranks":
            top = max(1, min(vocab, self.batch.targets.top))
        ranked = np.empty((count if logits == "ranks" else 1, top + 1), _RANKED)
        ranked_address = self.work.get("ranked", ranked.nbytes)
        host = np.empty((count, vocab), np.float32) if logits in ("all", "last") else None

        def rank(row, rows, targets, out):
            self.kernels.launch(HEAD, "rank", rows, 1024, device + 4 * row * vocab, i32(vocab), targets, i32(top), out)

        for at in range(0, count, most):
            m = min(most, count - at)
            if logits == "ranks":
                h = self.rms_norm(x, norm, rows=m, picked=self.target_rows + 4 * at)
            else:
                h = self.rms_norm(x + 4 * (first + at) * hidden, norm, rows=m)
            self._multiply(h, [matrix], device, m, self._bias(output))
            if scale != 1.0 or softcap is not None:
                self.kernels.launch(
                    HEAD,
                    "finish_logits",
                    -(-m * vocab // 1024),
                    1024,
                    device,
                    m * vocab,
                    f32(scale),
                    f32(softcap or 0.0),
                )
            if logits == "ranks":
                rank(0, m, self.target_tokens + 4 * at, ranked_address + at * ranked[0].nbytes)
            elif at + m == count:
                rank(m - 1, 1, 0, ranked_address)
            if host is not None:
                self.gpu.download(host[at : at + m], device)
        if self.weights.streaming:
            self.weights.prefetch()  # the next batch's first layers
        if logits == "ranks":
            coming = self.downloads.start(ranked, ranked_address)
            return lambda: _ranks(coming(), self.batch.targets.top)
        self.gpu.download(ranked, ranked_address)
        if self.cache is not None:
            self.cache.end_batch(self.batch.start, self.n)
        token, logit, logprob = ranked[0, 1].item()
        if token < 0:
            raise BackendError("the last position's logits hold NaN: the file's weights are damaged or out of range")
        return HeadResult(token, logit, logprob, host if logits == "all" or host is None else host[0])

    def positions_of(self, logits):
        """How many of the batch's positions have their logits made."""
        return {"all": self.n, "ranks": len(self.batch.targets.rows) if self.batch.targets else 0}.get(logits, 1)

    def _head_rows(self, vocab, logits):
        """Positions whose logits are made at a time: whole tiles of a GEMM, where there is room for one."""
        most = _LOGITS_BYTES // (4 * vocab)
        return max(1, min(self.positions_of(logits), most // 256 * 256 or most))

    def _upload(self, name, array):
        address = self.work.get(name, array.nbytes)
        self.gpu.upload(address, array)
        return address


def _ranks(ranked, top):
    """Ranks of rank's output, [S, 1 + at least top]."""
    likeliest = ranked[:, 1 : 1 + top]
    return Ranks(
        *(np.ascontiguousarray(x) for x in (ranked["logprob"][:, 0], likeliest["token"], likeliest["logprob"]))
    )
