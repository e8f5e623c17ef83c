"""Mistral Small 4 (Mistral AI): DeepSeek's latent attention, with queries that grow with the position; experts in every
layer."""

from __future__ import annotations

from .deepseek2 import DeepSeek2


class Mistral4(DeepSeek2):
    architecture = "mistral4"
    examples = "Mistral Small 4 119B"
