"""What a GGUF file is that holds no model of a family here: which kind of file or model, and what it would need.

Names of architectures are llama.cpp's (src/llama-arch.cpp), Ollama's where it has its own, and for images and sound
those of ComfyUI-GGUF and TTS.cpp. A name leaves the tables once it has a page.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ..gguf.keys import described as of_file
from ..gguf.keys import key_or_none

if TYPE_CHECKING:
    from .family import Family

LIST = "docs/models.md"  # where all architectures that run are listed


class Kind(NamedTuple):
    """What a file is: in words, and why it does not run, or what to do instead."""

    words: str
    advice: str


# Models: the advice says why kqprefill does not run such a one.
KINDS = {
    "encoder": Kind(
        "an encoder", "its tokens see those after them, too; kqprefill runs decoders, and of encoders gemma-embedding"
    ),
    "encoder-decoder": Kind("an encoder-decoder", "kqprefill runs decoders, whose prompt and answer are one text"),
    "recurrent": Kind("a recurrent language model", ""),
    "masked": Kind("a language model that fills in masked tokens", "its tokens see those after them, too"),
    "draft": Kind("a draft model", "it only helps a larger model to write faster; give that one's file"),
    "images": Kind("a diffusion model for images or video", "it has no next token"),
    "sound": Kind("a model that makes sound", "its tokens are no text"),
    "decoder": Kind("a decoder", ""),
    "unknown": Kind("a model of an architecture that kqprefill does not know", ""),
}

# Files that hold no model: the advice says what to give instead.
FILES = {
    "projector": Kind("only what sees or hears (mmproj)", "give the language model's own file"),
    "adapter": Kind("a LoRA adapter", "merge it into its model (llama-export-lora) and give that"),
    "importance matrix": Kind("an importance matrix, which llama-quantize reads", "give the model that it is of"),
    "control vector": Kind("a control vector", "give the model that it is for"),
    "vocabulary": Kind("a vocabulary without a model", "give the model's own file"),
    "nothing": Kind("a file without tensors", "give a language model's file"),
}

# Kinds of models but decoders: the architectures that are of them.
_NAMES = {
    "encoder": "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 modern-bert neo-bert eurobert llama-embed "
    "gemma-embedding2 t5encoder",
    "encoder-decoder": "t5 whisper",
    "masked": "dream llada llada-moe rnd1 diffusion-gemma",
    "draft": "eagle3 dflash gemma4-assistant",
    "images": "flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image",
    "sound": "wavtokenizer-dec qwen3tts pockettts kokoro dia parler-tts",
}
KIND_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}


class Lacking(NamedTuple):
    """A language model without a page.

    models: that people know. needs: in what its layers differ from those that run; empty where no difference is known.
    nearest: the supported architectures that are most like it.
    """

    models: str
    needs: str = ""
    nearest: str = ""


_ALIBI = "positions by ALiBi, a bias that falls with the distance"
_LEARNED = "positions that are learned vectors"
_SIDE_BY_SIDE = "attention side by side with a feed-forward network without a gate"
_INDEXER = "sparse attention (DSA), whose keys an indexer chooses"
_RWKV = "RWKV's time mixing in the place of attention"

RECURRENT = {
    "mamba": Lacking("Mamba, Falcon Mamba 7B", "the first Mamba's scan", "nemotron_h"),
    "mamba2": Lacking("Mamba 2, Mamba-Codestral 7B", "layers of Mamba-2 alone", "nemotron_h"),
    "rwkv6": Lacking("RWKV 6", _RWKV),
    "rwkv6qwen2": Lacking("QRWKV6", _RWKV),
    "rwkv7": Lacking("RWKV 7", _RWKV),
    "arwkv7": Lacking("ARWKV 7", _RWKV),
}
DECODERS = {
    "afmoe": Lacking("Arcee Trinity", "attention that is gated element by element", "glm4moe"),
    "apertus": Lacking("Apertus 8B", "the activation xIELU", "qwen3 llama"),
    "arcee": Lacking("Arcee AFM 4.5B", "a feed-forward network of ReLU squared without a gate", "llama"),
    "arctic": Lacking("Snowflake Arctic", "experts in parallel with a dense network of their own norm", "llama"),
    "baichuan": Lacking("Baichuan 2", f"in the 13B {_ALIBI}", "llama"),
    "bailingmoe": Lacking("Ling Lite", nearest="ernie4_5-moe"),
    "bailingmoe2": Lacking("Ling 2.0", nearest="glm4moe"),
    "bitnet": Lacking("BitNet b1.58", "norms inside attention and the feed-forward network", "llama"),
    "bloom": Lacking("BLOOM", _ALIBI, "starcoder2"),
    "chameleon": Lacking("Chameleon", "LayerNorm of q and k in Llama's layers", "llama command-r"),
    "chatglm": Lacking("ChatGLM 3, GLM-4-9B-Chat", nearest="glm4"),
    "codeshell": Lacking("CodeShell", nearest="starcoder2"),
    "cogvlm": Lacking("CogVLM", "weights of their own for images' tokens", "llama"),
    "cohere2moe": Lacking("Cohere 2 with experts", "experts in Cohere 2's layers", "cohere2"),
    "dbrx": Lacking("DBRX", "clamped q, k and v, and LayerNorm before experts", "llama"),
    "deci": Lacking("Llama Nemotron Super 49B", "layers without attention or without a network", "llama"),
    "deepseek": Lacking("DeepSeek MoE 16B", nearest="deepseek2 qwen2moe"),
    "deepseek2-ocr": Lacking("DeepSeek-OCR", nearest="deepseek2"),
    "deepseek32": Lacking("DeepSeek V3.2", _INDEXER, "deepseek2"),
    "deepseek4": Lacking("DeepSeek V4", "compressed sparse attention and hyper-connections", "deepseek2"),
    "dots1": Lacking("dots.llm1", nearest="glm4moe"),
    "exaone": Lacking("EXAONE 3.5", nearest="llama exaone4"),
    "exaone-moe": Lacking("K-EXAONE", nearest="exaone4 glm4moe"),
    "falcon": Lacking("Falcon 7B", _SIDE_BY_SIDE, "command-r"),
    "glm-dsa": Lacking("GLM-5", _INDEXER, "deepseek2"),
    "gpt2": Lacking("GPT-2", _LEARNED, "starcoder2"),
    "gptj": Lacking("GPT-J 6B", _SIDE_BY_SIDE, "starcoder2"),
    "gptneox": Lacking("GPT-NeoX 20B, Pythia", _SIDE_BY_SIDE, "starcoder2"),
    "granite_swa": Lacking("Granite with sliding windows", "windows and sinks in Granite's layers", "granite gpt-oss"),
    "grok": Lacking("Grok 2", "experts between norms, with soft caps", "gemma2"),
    "grovemoe": Lacking("GroveMoE", "experts that share others by groups", "qwen3moe"),
    "hunyuan_vl": Lacking("HunyuanOCR", "rotation by several position axes (XD-RoPE)", "hunyuan-dense"),
    "hy_v3": Lacking("Hy3", nearest="hunyuan-moe"),
    "jais": Lacking("Jais", _ALIBI, "starcoder2"),
    "jais2": Lacking("Jais 2", "a feed-forward network of ReLU squared without a gate", "starcoder2"),
    "jamba": Lacking("Jamba 1.5", "the first Mamba's scan among layers of attention", "granitehybrid"),
    "k2-horizon": Lacking("K2 Horizon", "experts for attention's values", "glm4moe"),
    "kimi-k3": Lacking("Kimi K3", "attention to earlier layers, and the activation SiTU", "kimi-linear"),
    "laguna": Lacking("Laguna XS.2", "attention under a softplus gate", "glm4moe"),
    "maincoder": Lacking("Maincoder 1B", nearest="hunyuan-dense"),
    "maple": Lacking("Maple", "experts whose gates are clamped, in layers with windows", "qwen3moe gpt-oss"),
    "mellum": Lacking("Mellum 2", nearest="qwen3moe"),
    "mimo2": Lacking("MiMo V2 Flash", "windows with sinks, and heads of two sizes", "gpt-oss"),
    "minicpm3": Lacking("MiniCPM3 4B", "latent attention under MiniCPM's multipliers", "minicpm deepseek2"),
    "minimax-01": Lacking("MiniMax-Text-01", "lightning attention (linear)", "minimax-m2"),
    "mllama": Lacking("Llama 3.2 Vision", "layers that attend to an image", "llama"),
    "mpt": Lacking("MPT 7B", _ALIBI, "starcoder2"),
    "nanbeige": Lacking("Nanbeige", "layers that are gone through more than once", "llama"),
    "nemotron": Lacking("Minitron 4B", "LayerNorm around a network of ReLU squared", "starcoder2"),
    "olmo": Lacking("OLMo 1", "LayerNorm without weights", "olmo2"),
    "openelm": Lacking("OpenELM", "layers of different widths", "llama"),
    "orion": Lacking("Orion 14B", "LayerNorm around Llama's layers", "llama"),
    "paddleocr": Lacking("PaddleOCR-VL", nearest="ernie4_5"),
    "pangu-embedded": Lacking("openPangu Embedded", nearest="qwen2"),
    "phi2": Lacking("Phi 2", _SIDE_BY_SIDE, "phi3"),
    "plamo": Lacking("PLaMo 13B", "attention side by side with a gated network under RMSNorm", "command-r"),
    "plamo2": Lacking("PLaMo 2", "PLaMo's Mamba among its layers of attention", "granitehybrid"),
    "plamo3": Lacking("PLaMo 3", nearest="glm4 gemma3"),
    "plm": Lacking("PLM 1.8B", "latent attention before a network of ReLU squared", "deepseek2"),
    "qwen": Lacking("Qwen 1", nearest="qwen2"),
    "qwen25vl": Lacking("Qwen 2.5 VL as Ollama converts it", nearest="qwen2vl"),
    "qwen4exp": Lacking("Qwen 4 (experimental)", "sparse attention (QSA) and hyper-connections", "qwen35moe"),
    "refact": Lacking("Refact 1.6B", _ALIBI, "llama"),
    "smallthinker": Lacking("SmallThinker", "experts that are chosen before attention", "qwen3moe"),
    "spark2_5": Lacking("Spark X2.5"),
    "stablelm": Lacking("StableLM 2", "LayerNorm around Llama's layers", "llama"),
    "starcoder": Lacking("StarCoder 1", _LEARNED, "starcoder2"),
    "step35": Lacking("Step 3.5 Flash", "attention that is gated head by head", "glm4moe"),
    "talkie": Lacking("Talkie 13B", "the embedding added again after each layer", "llama"),
    "xverse": Lacking("XVERSE 7B", nearest="llama"),
}
LACKING = {**DECODERS, **RECURRENT}


@dataclass(frozen=True)
class Described:
    """What a file is. kind: of KINDS or FILES. words: the same for people. examples: models of its architecture, parted
    by ", "."""

    kind: str
    words: str
    examples: str = ""


def describe_file(
    metadata: Mapping[str, Any], tensors: Collection[str], families: Mapping[str, type[Family]]
) -> Described:
    """What a file is, by its metadata and its tensors' names, whether a family runs it or not."""
    architecture = key_or_none(metadata, "general.architecture")
    if (kind := _file_kind(metadata, tensors)) is not None:
        of = f" for {architecture}" if kind == "adapter" and architecture else ""
        return Described(kind, FILES[kind].words + of)
    if architecture in families:
        family = families[architecture]
        kind = "encoder" if family.both_ways else "decoder"
        return Described(kind, KINDS[kind].words, family.examples)
    kind = _model_kind(architecture, metadata, tensors)
    return Described(kind, KINDS[kind].words, LACKING[architecture].models if architecture in LACKING else "")


def refusal(metadata: Mapping[str, Any], tensors: Collection[str], families: Mapping[str, type[Family]]) -> str | None:
    """Why a file is not run, in a clause that follows its name; None where it holds a model of one of the families."""
    architecture = key_or_none(metadata, "general.architecture")
    described = describe_file(metadata, tensors, families)
    if described.kind in FILES:
        return f"this is {described.words}; {FILES[described.kind].advice}"
    if architecture in families:
        return None
    if architecture is None:
        what = "" if described.kind == "unknown" else f"; by its tensors it is {described.words}"
        return f"metadata general.architecture is missing; this is no language model{what}"
    return f"architecture {of_file(architecture)} is not supported: {_lack(architecture, described, families)}"


def _lack(architecture: str, described: Described, families: Mapping[str, type[Family]]) -> str:
    """What is missing for an architecture, and which supported ones are most like it."""
    kind = KINDS[described.kind]
    lacking = LACKING.get(architecture)
    if kind.advice:
        return f"it is {kind.words}: {kind.advice}; {LIST} lists what runs"
    if lacking is None:
        near, why = nearest(architecture, families), "kqprefill does not know it"
    else:
        near = [name for name in lacking.nearest.split() if name in families]
        models = lacking.models
        why = f"{models} needs {lacking.needs}" if lacking.needs else f"kqprefill does not have {models} yet"
    named = ", ".join(f"{name} ({families[name].examples.split(', ')[0]})" for name in near)
    return f"{why}; {f'nearest: {named}; ' if near else ''}{LIST} lists what runs"


def nearest(architecture: str, families: Collection[str], most: int = 3) -> list[str]:
    """The supported names that are like one, at most so many: those of its own line, of the versions next to its, then
    those that are spelled alike."""
    architecture = architecture[:_LONGEST]
    line, version = _line_and_version(architecture)

    def distance(name: str) -> tuple[float, float, float]:
        its_line, its_version = _line_and_version(name)
        alike = SequenceMatcher(None, line, its_line).ratio()
        return -round(alike, 3), abs(version - its_version), -SequenceMatcher(None, architecture, name).ratio()

    close = [name for name in families if -distance(name)[0] >= _ALIKE]
    return sorted(close, key=distance)[:most]


_LONGEST = 64  # characters of a name that are looked at
_ALIKE = 0.75  # from so alike on, of 1, that a name may be meant by another


def _line_and_version(architecture: str) -> tuple[str, float]:
    """ "qwen35moe" is of the line "qwenmoe" and the version 3.5."""
    digits = re.search(r"([0-9])[._]?([0-9]*)", architecture)
    return re.sub(r"[^a-z]", "", architecture.lower()), float(f"{digits[1]}.{digits[2]}0") if digits else 0.0


def _file_kind(metadata: Mapping[str, Any], tensors: Collection[str]) -> str | None:
    """Which of FILES it is, or None for a model."""
    architecture, said = (key_or_none(metadata, f"general.{key}") for key in ("architecture", "type"))
    if said == "adapter" or "adapter.type" in metadata:
        return "adapter"
    if said == "imatrix" or "imatrix.chunk_count" in metadata:
        return "importance matrix"
    if architecture == "controlvector":
        return "control vector"
    if said == "mmproj" or architecture in ("clip", "mmproj"):
        return "projector"
    if not tensors:
        return "vocabulary" if "tokenizer.ggml.tokens" in metadata else "nothing"
    return None


def _model_kind(architecture: str | None, metadata: Mapping[str, Any], tensors: Collection[str]) -> str:
    """Which of KINDS a model is: by its name, else by what its metadata or its tensors tell."""
    if architecture in LACKING:
        return "recurrent" if architecture in RECURRENT else "decoder"
    if architecture in KIND_OF:
        return KIND_OF[architecture]
    if any(name.startswith(("model.diffusion_model.", "double_blocks.", "joint_blocks.")) for name in tensors):
        return "images"
    if metadata.get(f"{architecture}.attention.causal") is False:
        return "encoder"
    if f"{architecture}.decoder_block_count" in metadata:
        return "encoder-decoder"
    attention = any("attn" in name for name in tensors)
    if not attention and any(re.search(r"\.(ssm|time_mix)_", name) for name in tensors):
        return "recurrent"
    return "decoder" if attention and "token_embd.weight" in tensors else "unknown"
