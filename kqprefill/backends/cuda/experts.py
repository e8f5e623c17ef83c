"""The ops of mixtures of experts: routing, rows sorted by expert, grouped GEMMs over stacks of matrices (kernels/experts.cu)."""

from ctypes import c_int32 as i32
from dataclasses import replace
from functools import partial

from .gemm import ACTIVATIONS, Groups, Operand
from .kernels import EXPERTS
from .tiles import padded

MOST_EXPERTS, MOST_USED = 1024, 32  # experts.cu
_ROWS, _TOKENS = 65536, 16384  # copies of tokens' rows, and tokens, that go through experts at a time


def _tokens_at_once(used):
    return min(_TOKENS, _ROWS // used)


class ExpertOps:
    """Part of CudaOps."""

    def expert_rows(self, experts):
        """The numbers of rows that this batch's grouped GEMMs have, for compiling ahead."""
        step = _tokens_at_once(experts.used)
        return {m * experts.used for m in {min(self.n, step), self.n % step} - {0}}

    def moe(self, h, w, experts, *, activation, residual):
        router, *stacks = (
            self.weights.matrix(m) for m in (w.ffn_gate_inp, w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps)
        )
        count, used, hidden = experts.count, experts.used, h.columns
        g, u, d = (replace(stack, rows=stack.rows // count) for stack in stacks)  # an expert's
        self.enter("linear", [w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps], self.n * used // count)
        *biases, down_bias = (self._bias(m) for m in (w.ffn_gate_exps, w.ffn_up_exps, w.ffn_down_exps))
        w_scale = self._weight_scale(stacks[:2], h)
        act_scale = self._gated_scale(activation, h.gain, *stacks[:2], biases)
        gated, linear = self.gemms.choose([g, u], gated=True), self.gemms.choose([d])
        step = _tokens_at_once(used)
        for t in range(0, self.n, step):
            m = min(step, self.n - t)
            rows = m * used  # a token's copies count
            scores = self.work.get("scores", 4 * m * count)
            self._multiply(h.rows_from(t), [router], scores, m, self._bias(w.ffn_gate_inp))
            chosen, shares, places, counts = (
                self.work.get(name, 4 * n)
                for name, n in (("experts", rows), ("shares", rows), ("places", rows), ("counts", count))
            )
            launch = partial(self.kernels.launch, EXPERTS)
            launch(
                "route",
                -(-m // 8),
                256,
                scores,
                i32(m),
                i32(count),
                i32(used),
                i32(experts.normalise),
                i32(experts.routed_after),
                chosen,
                shares,
            )
            launch("count", count, 256, chosen, i32(rows), counts)
            launch("place", count, 1024, chosen, i32(rows), counts, places)
            x = replace(h, address=self.work.get("sorted", 2 * rows * padded(hidden)), rows=rows)
            launch("gather", rows, 128, h.rows_from(t).address, i32(used), i32(padded(hidden)), places, x.address)
            act = Operand(self.work.get("activated", 2 * rows * g.rows), g.rows, act_scale, rows)
            groups = self._groups(counts, count, rows, gated.group_rows(rows, [g, u], True, count))
            gated.gated(x, g, u, act, rows, w_scale, biases, ACTIVATIONS[activation], groups)
            sums = self.work.get("sums", 4 * rows * hidden)
            groups = self._groups(counts, count, rows, linear.group_rows(rows, [d], False, count))
            linear.linear(act, [d], sums, rows, self._weight_scale(stacks[2:], act), down_bias, False, groups)
            at = residual + 4 * t * hidden
            launch("combine", m, 256, at, sums, i32(used), i32(hidden), places, shares)
        return residual

    def _groups(self, counts, experts, rows, size):
        """The Groups of at most `size` rows each of what experts.cu counted."""
        address = self.work.get("groups", 16 * (rows // size + experts))
        number = self.work.get("group count", 4)
        self.kernels.launch(EXPERTS, "make_groups", 1, 1024, counts, i32(experts), i32(size), address, number)
        return Groups(address, number, experts)

    def add_gated(self, x, y, h, weight):
        self.enter("rest")
        vector, host = self.weights.vector(weight.tensor)
        columns = len(host)
        self.kernels.launch(
            EXPERTS, "add_gated", self.n, 256, x, y, h.address, i32(columns), i32(padded(columns)), h.scale, vector
        )
        return x
