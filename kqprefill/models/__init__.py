"""Model families, one a page, and the registry that finds the page for a file's general.architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ModelError
from ..gguf import ModelFile
from ..gguf.keys import read_key
from .cohere2 import Cohere2
from .command_r import CommandR
from .deepseek2 import DeepSeek2
from .ernie4_5 import Ernie45, Ernie45Moe
from .exaone4 import Exaone4
from .falcon_h1 import FalconH1
from .family import Family
from .gemma import Gemma
from .gemma2 import Gemma2
from .gemma3 import Gemma3
from .gemma3n import Gemma3n
from .gemma4 import Gemma4
from .gemma_embedding import GemmaEmbedding
from .glm4 import Glm4
from .glm4moe import Glm4Moe
from .gpt_oss import GptOss
from .granite import Granite
from .granitehybrid import GraniteHybrid
from .granitemoe import GraniteMoe
from .hunyuan import HunyuanDense, HunyuanMoe
from .internlm2 import InternLm2
from .kimi_linear import KimiLinear
from .lfm2 import Lfm2, Lfm2Moe
from .llama import Llama
from .llama4 import Llama4
from .minicpm import MiniCpm
from .minimax_m2 import MiniMaxM2
from .mistral3 import Mistral3
from .mistral4 import Mistral4
from .nemotron_h import NemotronH, NemotronHMoe
from .olmo2 import Olmo2
from .olmoe import Olmoe
from .phi3 import Phi3
from .phimoe import PhiMoe
from .qwen2 import Qwen2
from .qwen2moe import Qwen2Moe
from .qwen2vl import Qwen2Vl
from .qwen3 import Qwen3
from .qwen3moe import Qwen3Moe
from .qwen3next import Qwen3Next
from .qwen3vl import Qwen3Vl, Qwen3VlMoe
from .qwen35 import Qwen35, Qwen35Moe
from .seed_oss import SeedOss
from .smollm3 import SmolLM3
from .starcoder2 import StarCoder2
from .unsupported import refusal

_PAGES: tuple[type[Family], ...] = (
    Qwen3,
    Qwen3Moe,
    Llama,
    Qwen2,
    Qwen2Moe,
    Gemma,
    Gemma2,
    Gemma3,
    Gemma4,
    GemmaEmbedding,
    Mistral3,
    Phi3,
    Olmo2,
    Olmoe,
    Granite,
    SmolLM3,
    GptOss,
    Qwen3Vl,
    Qwen3VlMoe,
    Glm4,
    Glm4Moe,
    Qwen35,
    Qwen35Moe,
    Qwen3Next,
    DeepSeek2,
    Mistral4,
    MiniMaxM2,
    SeedOss,
    Ernie45,
    Ernie45Moe,
    Exaone4,
    GraniteMoe,
    Qwen2Vl,
    InternLm2,
    MiniCpm,
    Lfm2,
    Lfm2Moe,
    NemotronH,
    NemotronHMoe,
    GraniteHybrid,
    Llama4,
    Cohere2,
    HunyuanDense,
    HunyuanMoe,
    PhiMoe,
    CommandR,
    StarCoder2,
    Gemma3n,
    FalconH1,
    KimiLinear,
)
FAMILIES = {family.architecture: family for family in _PAGES}


def read_model(file: ModelFile) -> Family:
    """The family of an open file, over its tensors. Raises ModelError for one that is not supported."""
    return _family_of(file.metadata, file.path, file.tensors).open(file)


def describe_model(metadata: Mapping[str, Any], path: str, vocab_size: int) -> Family:
    """The family that the metadata of `path` names, described but without tensors (see Family). Raises ModelError."""
    return _family_of(metadata, path, ["token_embd.weight"])(metadata, path, vocab_size)


def _family_of(metadata: Mapping[str, Any], path: str, tensors: Collection[str]) -> type[Family]:
    """tensors: the names of those that the file has."""
    architecture = read_key(metadata, "general.architecture", lambda what: ModelError(f"{path}: {what}"))
    if (why_not := refusal(metadata, tensors, FAMILIES)) is not None:
        raise ModelError(f"{path}: {why_not}")
    return FAMILIES[architecture]
