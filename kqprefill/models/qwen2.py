"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama's layer with biases on q, k and v, and half-split rotary pairs."""

from __future__ import annotations

from .llama import Llama


class Qwen2(Llama):
    architecture = "qwen2"
    rope_interleaved = False
