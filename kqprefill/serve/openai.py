"""Requests and answers in the shapes of OpenAI's interface, and of those that have grown beside it (vLLM's
/tokenize, Jina's and TEI's /rerank): what is asked of the engine, and what is made of its results.

None of this waits for anything: it is work for a thread beside the one that answers clients.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
import time
from typing import Any, TypeAlias
import uuid

from ..core import Float32Array
from ..engine.embedding import Normalise, pooling_of
from ..engine.model import Model
from ..engine.reranking import ANSWERS, answer_token, classifier_of, question_of, share
from ..engine.scoring import Item, Scored
from ..gguf.keys import described
from .fields import ApiError, Fields
from .queue import SCORES, Kind
from .texts import Echo, Texts

Answer: TypeAlias = "dict[str, Any] | list[dict[str, Any]]"


@dataclass(frozen=True)
class Server:
    """What all requests are answered by. name: the model's, for clients. top: the likeliest tokens that a client may
    ask for, at most; most_tokens: of a request. pooling: of vectors, None for what the file says. always_bos: whether
    /tokenize begins with the BOS that the file asks for even where a client wants none."""

    model: Model
    name: str
    top: int
    most_tokens: int
    pooling: str | None = None
    always_bos: bool = False

    def check_tokens(self, items: Sequence[Item]) -> None:
        """Raise ApiError (413) where prompts have more tokens than a request may."""
        tokens = sum(item.tokens for item in items)
        if tokens > self.most_tokens:
            raise ApiError(413, f"{tokens} tokens in one request; {self.most_tokens} are allowed: send several")


class Asked:
    """A request that has been read: the prompts to compute, of one kind, and the answer to make of the results.

    items: those prompts; there may be none. Making one raises ApiError or KqprefillError for a bad request.
    """

    kind: Kind = SCORES
    items: Sequence[Item] = ()

    def answer(self, results: list[Any]) -> Answer:
        """The response's JSON, of a result for each item."""
        raise NotImplementedError


class Completion(Asked):
    """POST /v1/completions: log-probabilities of prompts (echo), and of the greedy token after them (max_tokens 1)."""

    def __init__(self, server: Server, fields: Fields) -> None:
        self._server = server
        if server.model.family.both_ways:
            raise ApiError(400, "the model's tokens see those after them: it gives vectors (/v1/embeddings)")
        prompt = fields.take("prompt")
        self._echo = fields.flag("echo", False)
        self._top: int | None = fields.count("logprobs", server.top, None)
        self._more = self._max_tokens(fields)
        special = fields.flag("add_special_tokens", True)
        self._as_ids = fields.flag("return_tokens_as_token_ids", False)
        temperature = fields.number("temperature", 0)
        if temperature and self._more:
            raise ApiError(
                400, f'"temperature" is {temperature}, but the token is the greedy one; give 0', "temperature"
            )
        for name in ("n", "best_of"):
            fields.refuse(name, 1, why="there is one completion of a prompt")
        fields.refuse("stream", False, why="answers are given whole")
        for name in ("stop", "suffix", "logit_bias", "prompt_logprobs"):
            fields.refuse(name, [], "", {})
        for name in ("frequency_penalty", "presence_penalty"):
            fields.refuse(name, 0, 0.0)
        fields.refuse("repetition_penalty", 1, 1.0)
        fields.ignore("model", "seed", "user", "top_p", "top_k", "min_p", "stream_options", "metadata")
        fields.end()
        prompts = prompts_of(prompt, "prompt")
        self._texts = [isinstance(own, str) for own in prompts]
        self._prompts = [_ids(server.model, own, special) for own in prompts]
        self._scores_prompt = self._echo and self._top is not None
        if self._more and self._scores_prompt:
            # What comes after the last token is ranked with the others; the token that stands there is any.
            self.items = [Item([*ids, 0]) for ids in self._prompts]
        elif self._more:
            self.items = [Item(ids, [[0]]) for ids in self._prompts]
        elif self._scores_prompt:
            self.items = [Item(ids) for ids in self._prompts]
        server.check_tokens([Item(ids) for ids in self._prompts])
        self._special = special

    def _max_tokens(self, fields: Fields) -> int:
        value = fields.take("max_tokens", None)
        if type(value) is not int or value not in (0, 1):
            given = "is missing" if value is None else f"is {described(value)}"
            raise ApiError(400, f'"max_tokens" {given}; this server computes prompts: give 0 or 1', "max_tokens")
        return value

    def answer(self, results: list[Any]) -> Answer:
        texts = Texts(self._server.model, self._as_ids)
        choices = []
        for index, (ids, is_text) in enumerate(zip(self._prompts, self._texts)):
            scored: Scored | None = results[index] if self.items else None
            choices.append(self._choice(index, ids, is_text, scored, texts))
        read, made = sum(map(len, self._prompts)), self._more * len(self._prompts)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._server.name,
            "choices": choices,
            "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
        }

    def _choice(self, index: int, ids: list[int], is_text: bool, scored: Scored | None, texts: Texts) -> dict[str, Any]:
        made = [int(scored.top_tokens[-1, 0])] if scored is not None and self._more else []
        given = ids if self._echo else []
        shown, echo = given + made, Echo(texts, given, made, is_text and self._special)
        logprobs = None
        if self._top is not None:
            first = 1 if self._echo and ids else 0  # nothing comes before the first token of a prompt
            own, likeliest = self._ranks(scored, texts, shown[first:])
            logprobs = {
                "tokens": echo.tokens,
                "token_logprobs": [*[None] * first, *own],
                "top_logprobs": [*[None] * first, *likeliest],
                "text_offset": echo.offsets,
            }
        return {"index": index, "text": echo.text, "finish_reason": "length", "logprobs": logprobs}

    def _ranks(
        self, scored: Scored | None, texts: Texts, shown: list[int]
    ) -> tuple[list[float], list[dict[str, float]]]:
        """The log-probabilities of tokens that were scored, and the likeliest ones at their places with theirs."""
        if scored is None or not shown:
            return [], []
        count = self._top or 0
        given = scored.logprobs.tolist()
        if self._more:
            given[-1] = float(scored.top_logprobs[-1, 0])
        tokens, values = scored.top_tokens[:, :count].tolist(), scored.top_logprobs[:, :count].tolist()
        likeliest = []
        for token, logprob, others, theirs in zip(shown, given, tokens, values):
            own: dict[str, float] = {}
            for other, value in zip(others, theirs):  # the likeliest first: of tokens with one text it counts
                own.setdefault(texts.of(other), logprob if other == token else value)
            own.setdefault(texts.of(token), logprob)
            likeliest.append(own)
        return given, likeliest


class Embeddings(Asked):
    """POST /v1/embeddings: a vector of each input."""

    def __init__(self, server: Server, fields: Fields) -> None:
        self._server = server
        prompts = prompts_of(fields.take("input"), "input")
        self._base64 = fields.text("encoding_format", "float") == "base64"
        norm = fields.count("embd_normalize", 2, 2, -1)
        if norm not in (-1, 2):
            raise ApiError(
                400, f'"embd_normalize" is {norm}; 2 (Euclidean) and -1 (none) are possible', "embd_normalize"
            )
        normalise: Normalise = "l2" if norm == 2 else "none"
        fields.refuse("dimensions", server.model.config.embedding_length, why="vectors are given whole")
        fields.ignore("model", "user")
        fields.end()
        self.kind = Kind(pooling_of(server.model.family, server.pooling), normalise)
        self.items = [Item(server.model.embedding_ids(prompt)) for prompt in prompts]
        server.check_tokens(self.items)

    def answer(self, results: list[Any]) -> Answer:
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(vector)}
            for index, vector in enumerate(results)
        ]
        tokens = sum(item.tokens for item in self.items)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": self._server.name, "data": data, "usage": usage}

    def _written(self, vector: Float32Array) -> str | list[float]:
        if self._base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


class Rerank(Asked):
    """POST /v1/rerank: how well documents answer a query, the best first; with "texts", as TEI answers."""

    def __init__(self, server: Server, fields: Fields) -> None:
        self._server, model = server, server.model
        query = fields.text("query")
        self._bare = "texts" in fields.names
        name = "texts" if self._bare else "documents"
        self._documents = _documents(fields.take(name), name)
        self._most: int = fields.count("top_n", len(self._documents), len(self._documents), 1)
        self._with_text = fields.flag("return_text" if self._bare else "return_documents", False)
        fields.refuse("raw_scores", False)
        fields.ignore("model", "user", "truncate", "truncation_direction")
        fields.end()
        self._matrix = classifier_of(model)
        answers = [] if self._matrix is not None else [answer_token(model, word) for word in ANSWERS]
        questions = [model.tokenize(question_of(model, query, document)) for document in self._documents]
        for ids in questions:
            model.item([*ids, 0])  # which has room for an answer
        if self._matrix is not None:
            self.kind = Kind("last", "none")
        self.items = [Item(ids, answers or None, bool(answers)) for ids in questions]
        server.check_tokens(self.items)

    def answer(self, results: list[Any]) -> Answer:
        if self._matrix is not None:
            scores = [share(*(self._matrix @ vector)) for vector in results]
        else:
            scores = [share(*(scored.logprob for scored in choices)) for choices in results]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._most]
        if self._bare:
            return [self._with({"index": i, "score": scores[i]}, i, "text") for i in best]
        tokens = sum(len(item.prompt) for item in self.items)
        return {
            "object": "list",
            "model": self._server.name,
            "results": [self._with({"index": i, "relevance_score": scores[i]}, i, "document") for i in best],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _with(self, result: dict[str, Any], index: int, key: str) -> dict[str, Any]:
        text = self._documents[index]
        return result | {key: text if key == "text" else {"text": text}} if self._with_text else result


class Tokenize(Asked):
    """POST /tokenize: a text's token ids."""

    def __init__(self, server: Server, fields: Fields) -> None:
        name = "content" if "content" in fields.names else "prompt"  # llama-server's word, and vLLM's
        text = fields.text(name)
        special = fields.flag("add_special", False) if name == "content" else fields.flag("add_special_tokens", True)
        parse_special = fields.flag("parse_special", True)
        fields.ignore("model")
        fields.end()
        self._ids = server.model.tokenize(text, special, parse_special)
        bos = server.model.tokenizer().bos if server.always_bos else None
        if bos is not None and self._ids[:1] != [bos]:
            self._ids = [bos, *self._ids]
        self._most = server.model.config.context_length

    def answer(self, results: list[Any]) -> Answer:
        return {"tokens": self._ids, "count": len(self._ids), "max_model_len": self._most}


class Detokenize(Asked):
    """POST /detokenize: the text of token ids."""

    def __init__(self, server: Server, fields: Fields) -> None:
        ids = fields.take("tokens")
        fields.ignore("model")
        fields.end()
        checked = server.model.item(ids).prompt if ids != [] and isinstance(ids, list) else []
        if not isinstance(ids, list):
            raise ApiError(400, '"tokens" must be a list of token ids', "tokens")
        self._text = server.model.tokenizer().decode(checked, add_special=False).decode("utf-8", "replace")

    def answer(self, results: list[Any]) -> Answer:
        return {"prompt": self._text, "content": self._text}


def tokenizer_info(server: Server) -> dict[str, Any]:
    """GET /tokenizer_info: what lm-evaluation-harness asks for; null where the file does not say. Raises ModelError."""
    tokenizer, metadata = server.model.tokenizer(), server.model.file.metadata
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    named = {name: server.model.token_text(token) if isinstance(token, int) else None for name, token in ids.items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": str(metadata.get("tokenizer.ggml.model")),
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "pad_token": named["padding"],
        "chat_template": template if isinstance(template, str) else None,
        "add_bos_token": tokenizer.bos is not None,
    }


def models(server: Server, created: int) -> dict[str, Any]:
    """GET /v1/models: the one that there is. created: when it was opened, in seconds since 1970."""
    model = {
        "id": server.name,
        "object": "model",
        "created": created,
        "owned_by": "kqprefill",
        "max_model_len": server.model.config.context_length,
        "precision": server.model.precision,
    }
    return {"object": "list", "data": [model]}


def prompts_of(value: Any, name: str) -> list[Any]:
    """The prompts that a field gives: a text, token ids, or a list of texts or of ids. Raises ApiError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds in ({str}, {list}):
            return value
    raise ApiError(400, f'"{name}" must be a text, token ids, or a list of texts or of lists of ids, not empty', name)


def _ids(model: Model, prompt: Any, special: bool) -> list[int]:
    """A prompt's ids, valid ones that have room. Raises KqprefillError."""
    ids = model.tokenize(prompt, special) if isinstance(prompt, str) else prompt
    return model.item(ids).prompt


def _documents(value: Any, name: str) -> list[str]:
    """Texts, or objects that have one as "text"."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, f'"{name}" must be a list of texts, not empty', name)
    given = [own.get("text") if isinstance(own, dict) else own for own in value]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise ApiError(400, f'"{name}" must be a list of texts', name)
    return texts
