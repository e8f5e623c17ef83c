"""InternLM 2 and 2.5 (arXiv 2403.17297): Llama's layers."""

from __future__ import annotations

from .llama import Llama


class InternLm2(Llama):
    architecture = "internlm2"
    examples = "InternLM 2.5 7B, InternLM 2.5 20B"
