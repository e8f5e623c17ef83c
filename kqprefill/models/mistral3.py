"""Mistral 3 and Ministral 3: Llama's layers; queries at positions past the context that the model was first trained on
are multiplied by a temperature, which grows with the position (arXiv 2501.19399)."""

from __future__ import annotations

from dataclasses import replace

from .llama import Llama


class Mistral3(Llama):
    architecture = "mistral3"
    examples = "Ministral 3 8B, Ministral 3 14B, Devstral Small 2 24B"

    def read_hyper_parameters(self) -> None:
        super().read_hyper_parameters()
        if self.meta.has("attention.temperature_scale"):
            beta = self.meta.number("attention.temperature_scale")
            length = self.meta.integer("rope.scaling.original_context_length")
            self.rope = replace(self.rope, beta=beta, beta_length=length)
