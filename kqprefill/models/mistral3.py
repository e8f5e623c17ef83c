"""Mistral 3 and what follows it: Llama's layers, with YaRN from the metadata."""

from .llama import Llama


class Mistral3(Llama):
    architecture = "mistral3"

    def read_hyper_parameters(self):
        super().read_hyper_parameters()
        if self.meta.has("attention.temperature_scale"):
            raise self.meta.error("attention.temperature_scale (queries scaled by position) is not supported yet")
