"""Mixtures of experts: routing, rows sorted by expert, grouped GEMMs over stacks of matrices (kernels/experts.cu)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
import math
from typing import TypeAlias

from ....models.experts import Experts
from ....models.ops import Sums
from ....models.weights import Weight, Weights
from ..constants import ACTIVATIONS as NUMBERS
from ..constants import ENTRIES_AT_ONCE, THREADS
from ..device.arrays import FLOAT16, FLOAT32, INT8, INT32, DeviceArray
from ..device.signatures import Argument
from ..gemm.operand import BYTES, HALVES, MORE_ROWS, Gemm, Groups, Operand, output_row_bytes
from ..programs import ACTIVATIONS, EXPERTS
from ..weights.matrix import Matrix
from .batch import TOKENS_AT_ONCE, Combination, Residual
from .dense import DenseOps

_ROWS = 65536  # copies of tokens' rows that go through experts at a time
_ROUTED_A_BLOCK = THREADS["route"] // 32  # tokens: a warp has one
_GROUP_WORDS = 4  # of kernels/include/groups.cuh's Group


# activate(a GEMM, rows sorted by expert, their groups): the operand of the experts' second matrices.
_Activate: TypeAlias = Callable[[Gemm, Operand, Groups], Operand]


class ExpertOps(DenseOps):
    """Part of CudaOps."""

    def router_scores(self, x: Residual, norm: Weight, router: Weight, scale: float) -> Sums:
        h = self.normalise(x.values, norm)
        scores = self.work.array("router scores", FLOAT32, self.n, router.shape[0])
        self.enter("linear", [router], self.n)
        h = self.scaled(h, scale)
        self.hear([router], h)
        self.multiply(h, [self.matrix(router)], scores)
        return scores

    def moe(
        self,
        h: Operand,
        w: Weights,
        experts: Experts,
        *,
        activation: str,
        residual: Residual | None = None,
        scores: Sums | None = None,
        shared: tuple[Sums, Weight] | None = None,
    ) -> Residual | Sums:
        h, residual = self.own(h, residual)
        count, used, hidden = experts.count, experts.used, h.columns
        if shared is not None:
            self.hear([shared[1]], h)
        out = residual.values if residual is not None else self.work.array("combined", FLOAT32, self.n, hidden)
        if scores is None:
            self.enter("linear", [w.ffn_gate_inp], self.n)
            self.hear([w.ffn_gate_inp], h)
        raising = [w.ffn_gate_exps, w.ffn_up_exps] if experts.gated else [w.ffn_up_exps]
        self.enter("linear", [*raising, w.ffn_down_exps], self.n, share=used / count)
        stacks, down = [self.matrix(weight) for weight in raising], self.matrix(w.ffn_down_exps)
        ones, d = [stack.one_of(count) for stack in stacks], down.one_of(count)
        biases, down_bias = [self.bias(weight) for weight in raising], self.bias(w.ffn_down_exps)
        activate = self._gated_experts if experts.gated else self._ungated_experts
        activated = activate(h, stacks, ones, biases, activation)
        first, second = self.context.gemms.choose(ones), self.context.gemms.choose([d])
        step = min(TOKENS_AT_ONCE, _ROWS // used)
        for t in range(0, self.n, step):
            end = min(t + step, self.n)
            rows = (end - t) * used  # a token's copies count
            tokens = h.part(t, end)
            if scores is None:
                own = self.work.array("scores", FLOAT32, end - t, count)
                self.multiply(tokens, [self.matrix(w.ffn_gate_inp)], own, self.bias(w.ffn_gate_inp))
            else:
                own = scores.rows(t, end)
            chosen, shares = self._route(own, experts, w)
            first_rows = first.group_rows(rows, ones, experts.gated, count)
            second_rows = second.group_rows(rows, [d], False, count)
            fullest_first = second.fullest_first(rows, d, count)
            firsts, places, first_groups, second_groups = self._arrange(
                chosen, count, first_rows, second_rows, fullest_first
            )
            x = self._gather(tokens, places, used, shares if experts.weighs_input else None, ones[0].int8)
            self.hear(raising, x, firsts=firsts)
            act = activated(first, x, first_groups)
            self.hear([w.ffn_down_exps], act, firsts=firsts)
            if d.int8:
                sums = self.work.array("sums in blocks", INT8, rows, output_row_bytes(hidden))
            else:
                sums = self.work.array("sums", FLOAT16, rows, hidden)
            sum_scale = self._grouped(second, act, down, d, sums, down_bias, second_groups)
            opened = None
            if shared is not None:
                opened = shared[0].rows(t, end), self.context.small.vector(shared[1].tensor)[0]
            copies: dict[str, Argument] = {
                "sums": sums,
                "in_blocks": int(d.int8),
                "sums_scale": sum_scale,
                "used": used,
                "place_of": places,
                "share_of": shares,
            }
            combine = partial(self._combine, out.rows(t, end), copies, tokens, residual is not None, opened)
            if residual is not None and shared is None and end - t == self.n:
                return Residual(out, combination=Combination(copies, combine))
            combine()
        return out if residual is None else Residual(out)

    def _gated_experts(
        self,
        h: Operand,
        stacks: list[Matrix],
        ones: list[Matrix],
        biases: list[DeviceArray | None],
        activation: str,
    ) -> _Activate:
        """What makes act(gate · x) * up · x of rows sorted by expert. stacks: the experts' gates and ups, of which
        `ones` are the first."""
        (gate, up), (g, u), both = stacks, ones, (biases[0], biases[1])
        weight_scale = self.scales.of_weights([gate, up], h.norm)
        act_scale = self.gated_scale(activation, h, gate, up, both)

        def activated(gemm: Gemm, x: Operand, groups: Groups) -> Operand:
            act = Operand(self._activated(x.rows, g.rows), g.rows, act_scale)
            gemm.gated(x, g, u, act, weight_scale, both, activation, groups)
            return act

        return activated

    def _ungated_experts(
        self,
        h: Operand,
        stacks: list[Matrix],
        ones: list[Matrix],
        biases: list[DeviceArray | None],
        activation: str,
    ) -> _Activate:
        """The same of act(up · x), for experts without a gate."""
        (up,), (u,), (bias,) = stacks, ones, biases

        def activated(gemm: Gemm, x: Operand, groups: Groups) -> Operand:
            made = self.work.array("up", FLOAT16, x.rows, u.rows)
            made_scale = self._grouped(gemm, x, up, u, made, bias, groups)
            act = Operand(self._activated(x.rows, u.rows), u.rows, self.activated_scale(activation, made_scale))
            self.launcher.launch(
                ACTIVATIONS,
                "activate_halves",
                grid=x.rows,
                x=made,
                x_scale=made_scale,
                columns=u.rows,
                activation=NUMBERS[activation],
                scale=act.scale,
                out=act.values,
                stride=act.values.shape[1],
            )
            return act

        return activated

    def _grouped(
        self,
        gemm: Gemm,
        a: Operand,
        stack: Matrix,
        one: Matrix,
        out: DeviceArray,
        bias: DeviceArray | None,
        groups: Groups,
    ) -> DeviceArray:
        """Rows sorted by expert through a stack's matrices, of which `one` is the first, to halves or blocks. Returns
        the scale of these."""
        weight_scale = self.scales.of_weights([stack], a.norm)  # which measures it, too
        if a.length is None:
            scale = self.scales.of_outputs(stack, math.sqrt(one.columns), bias, input_scale=a.scale)
        else:
            scale = self.scales.of_outputs(stack, a.length, bias)
        gemm.linear(a, [one], out, weight_scale, bias, False, groups, scale, ldo=out.shape[1])
        return scale

    def _combine(
        self,
        x: DeviceArray,
        copies: dict[str, Argument],
        tokens: Operand,
        add: bool,
        shared: tuple[Sums, DeviceArray] | None = None,
    ) -> None:
        """x (+ x) = the sums of tokens' copies under their shares. copies: outputs and their scale, how many a token
        has, which row each is in, and its share. shared: what a network for all makes of these tokens, and the vector
        that opens it."""
        self.launcher.launch(
            EXPERTS,
            "combine",
            grid=x.shape[0],
            x=x,
            **copies,
            columns=x.shape[1],
            shared=shared[0] if shared is not None else None,
            h=tokens.values,
            stride=tokens.values.shape[1],
            h_scale=tokens.scale,
            gate=shared[1] if shared is not None else None,
            add=int(add),
        )

    def _activated(self, rows: int, width: int) -> DeviceArray:
        """Where gate's and up's outcome goes. What pads its columns is zero: it is an array that nobody else writes,
        whose new memory is zero, and no kernel writes the padding but as zeros."""
        stride = HALVES.padded(width)
        name = "activated" if stride == width else f"activated, {width} of {stride}"
        return self.work.array(name, HALVES.dtype, rows, stride)

    def _route(self, scores: DeviceArray, experts: Experts, w: Weights) -> tuple[DeviceArray, DeviceArray]:
        """From each token's scores the experts of its copies, and their shares: [tokens * used] each."""
        tokens, count = scores.shape
        rows = tokens * experts.used
        chosen, shares = self.work.array("experts", INT32, rows), self.work.array("shares", FLOAT32, rows)
        grid = -(-tokens // _ROUTED_A_BLOCK)
        bias, expert_scale = w.get("exp_probs_b_bias"), self.vector(w.get("ffn_down_exps_scale"))
        if experts.chooses_by_more or bias is not None:
            self.launcher.launch(
                EXPERTS,
                "route_biased",
                grid=grid,
                scores=scores,
                bias=self.vector(bias),
                expert_scale=expert_scale,
                n=tokens,
                experts=count,
                used=experts.used,
                sigmoid=int(experts.sigmoid),
                normalise=int(experts.normalise),
                scale=experts.scale,
                groups=experts.groups,
                groups_used=experts.groups_used,
                expert_of=chosen,
                share_of=shares,
            )
        else:
            self.launcher.launch(
                EXPERTS,
                "route",
                grid=grid,
                scores=scores,
                expert_scale=expert_scale,
                n=tokens,
                experts=count,
                used=experts.used,
                normalise=int(experts.normalise),
                routed_after=int(experts.routed_after),
                expert_of=chosen,
                share_of=shares,
            )
        return chosen, shares

    def _arrange(
        self, chosen: DeviceArray, experts: int, gated_rows: int, linear_rows: int, fullest_first: bool
    ) -> tuple[DeviceArray, DeviceArray, Groups, Groups]:
        """Of the tokens' copies, ordered by expert: each expert's first row, [experts]; which row each has, [copies];
        their groups of at most so many rows each, for gate and up, and for down, these with the fullest first if
        asked."""
        (rows,) = chosen.shape
        blocks = -(-rows // ENTRIES_AT_ONCE)
        counts = self.work.array("counts", INT32, blocks, experts)
        places = self.work.array("places", INT32, rows)
        self.launcher.launch(
            EXPERTS, "count", grid=blocks, expert_of=chosen, entries=rows, experts=experts, counts=counts
        )
        gated, linear = (
            Groups(
                self.work.array(f"{name} groups", INT32, rows // size + experts, _GROUP_WORDS),
                self.work.array(f"{name} group count", INT32, 1),
                experts,
            )
            for name, size in (("gated", gated_rows), ("linear", linear_rows))
        )
        self.launcher.launch(
            EXPERTS,
            "arrange",
            grid=1,
            counts=counts,
            blocks=blocks,
            experts=experts,
            gated_tokens=gated_rows,
            gated_groups=gated.groups,
            gated_count=gated.count,
            linear_tokens=linear_rows,
            linear_groups=linear.groups,
            linear_count=linear.count,
            fullest_first=int(fullest_first),
        )
        self.launcher.launch(
            EXPERTS,
            "place",
            grid=blocks,
            expert_of=chosen,
            entries=rows,
            experts=experts,
            starts=counts,
            place_of=places,
        )
        firsts = DeviceArray(counts.address, INT32, (experts,))  # of the first block's rows: of all
        return firsts, places, gated, linear

    def _gather(
        self, tokens: Operand, places: DeviceArray, used: int, shares: DeviceArray | None, int8: bool
    ) -> Operand:
        """Copies of tokens' rows, in the experts' order; where shares are given, times these, which then are 1. int8:
        whether the experts are."""
        rows = places.shape[0]
        if int8 and tokens.rounded is not None and shares is None and self.collector is None:
            assert tokens.length is not None, "rounded rows come from a norm"
            x, scales = tokens.rounded
            values = self.work.array("sorted in int8", BYTES.dtype, rows, x.shape[1])
            scale = self.work.array("sorted rows' scales", FLOAT32, rows + MORE_ROWS)
            self._gather_rows(x, scales, used, places, values, scale)
            return replace(tokens, values=values, scale=scale, format=BYTES, rounded=None)
        assert tokens.format is HALVES, "rows of halves are gathered"
        stride = tokens.values.shape[1]
        values = self.work.array("sorted", HALVES.dtype, rows, stride)
        if shares is None:
            self._gather_rows(tokens.values, None, used, places, values, None)
        else:
            self.launcher.launch(
                EXPERTS,
                "gather_shares",
                grid=rows,
                x=tokens.values,
                used=used,
                stride=stride,
                place_of=places,
                share_of=shares,
                sorted=values,
            )
        return replace(tokens, values=values, rounded=None)

    def _gather_rows(
        self,
        x: DeviceArray,
        scales: DeviceArray | None,
        used: int,
        places: DeviceArray,
        to: DeviceArray,
        to_scales: DeviceArray | None,
    ) -> None:
        """`used` copies of each of x's rows, and of their scales, to their places."""
        self.launcher.launch(
            EXPERTS,
            "gather",
            grid=places.shape[0] // used,
            x=x,
            scales=scales,
            used=used,
            row_bytes=x.shape[1] * x.dtype.itemsize,
            place_of=places,
            sorted=to,
            sorted_scales=to_scales,
        )
