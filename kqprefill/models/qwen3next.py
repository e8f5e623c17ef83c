"""Qwen 3 Next: Qwen 3.5's layers with experts, before the converter put value heads by turns: beta's and alpha's rows
are in one matrix, and in the first files q's, k's, v's and z's too, key head by key head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import Rope
from .qwen35 import Qwen35Moe
from .weights import Parts, Shapes


class Qwen3Next(Qwen35Moe):
    architecture = "qwen3next"
    examples = "Qwen3-Next 80B-A3B"
    by_turns = False

    def mixer_shapes(self, index: int) -> Shapes:
        shapes, net, hidden = super().mixer_shapes(index), self.net, self.config.embedding_length
        if self.recurrent[index]:
            del shapes["ssm_beta"], shapes["ssm_alpha"]
            qkv, gate = shapes.pop("attn_qkv"), shapes.pop("attn_gate")
            shapes = {"attn_qkv?": qkv, "attn_gate?": gate, "ssm_in?": (qkv[0] + gate[0], hidden), **shapes}
            shapes["ssm_ba"] = (2 * net.value_heads, hidden)
        return shapes

    def block_parts(self, index: int) -> Parts:
        parts, net, d = super().block_parts(index), self.net, self.net.head_dim
        if not self.recurrent[index]:
            return parts
        shared = net.value_heads // net.key_heads  # value heads of a key head

        def rows(widths: list[int], part: int) -> NDArray[np.intp]:
            """The rows of one of several parts that follow one another within each key head's rows."""
            begin, whole = sum(widths[:part]), sum(widths)
            return np.concatenate([np.arange(widths[part]) + begin + whole * head for head in range(net.key_heads)])

        ba, qkvz = [shared, shared], [d, d, shared * d, shared * d]
        qkv = np.concatenate([rows(qkvz, part) for part in range(3)])
        return {
            **parts,
            "ssm_ba": {"ssm_beta": rows(ba, 0), "ssm_alpha": rows(ba, 1)},
            "ssm_in": {"attn_qkv": qkv, "attn_gate": rows(qkvz, 3)},
        }

    def rotated(self, rope: Rope) -> Rope:
        return rope
