"""Scoring on a Ray cluster (the extra `ray`): a class for pipelines of Ray Data, and what `kqprefill score --ray` runs.

import ray
from kqprefill.ray import Scorer

scores = ray.data.read_parquet("corpus/").map_batches(
    Scorer,
    fn_constructor_kwargs={"model": "model.gguf", "vram": "20G"},
    batch_format="pyarrow",
    batch_size=1024,
    compute=ray.data.ActorPoolStrategy(size=8),
    num_gpus=1,
)
"""

from .scorer import Scorer

__all__ = ["Scorer"]
