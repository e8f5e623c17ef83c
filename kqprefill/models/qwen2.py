"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama's layer with biases on q, k and v, and half-split rotary pairs."""

from __future__ import annotations

from .llama import Llama


class Qwen2(Llama):
    architecture = "qwen2"
    examples = "Qwen 2.5 7B, Qwen 2.5 72B, QwQ 32B, DeepSeek-R1-Distill-Qwen 32B"
    rope_interleaved = False
