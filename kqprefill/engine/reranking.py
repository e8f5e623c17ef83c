"""How well documents answer a query, by a model that was trained to say so (Qwen3-Reranker): the probability of "yes",
of "yes" and "no", after a text that asks for one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, ModelError
from ..gguf import dequantize

if TYPE_CHECKING:
    from .model import Model

ANSWERS = "yes", "no"
_TEMPLATE = "tokenizer.chat_template.rerank"
# What Qwen3-Reranker's model card asks with: most files of it have no template for that.
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web '
    "search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>"
    "\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def question_of(model: Model, query: str, document: str) -> str:
    """The text that asks the model, by the file's template for it. Raises ModelError where the model has none."""
    template = model.file.metadata.get(_TEMPLATE)
    if template is None and model.config.architecture == "qwen3":
        template = _QWEN3
    if not isinstance(template, str):
        raise ModelError(f"{model.file.path}: no reranker: it has no {_TEMPLATE}")
    # One after the other, so that a query that says {document} is not filled in.
    before, _, after = template.partition("{query}")
    filled = after.replace("{document}", document)
    return before.replace("{document}", document) + query + filled


def relevances(model: Model, query: str, documents: Iterable[str]) -> list[float]:
    """The probability of "yes" for each document, from 0 to 1. Raises as `question_of` and `relevances_of` do."""
    return list(relevances_of(model, (model.tokenize(question_of(model, query, each)) for each in documents)))


def relevances_of(
    model: Model, questions: Iterable[list[int] | None], answers: tuple[str, str] = ANSWERS
) -> Iterator[float]:
    """The probability of the first answer after each question, token ids; None among them has all before it computed at
    once.

    A file with a classifier (cls.output.weight, rows "yes" and "no") has it multiplied by the last position's vector;
    else the two answers' log-probabilities are compared. Raises InputError where a question is too long, or the
    vocabulary does not have the two as tokens; BackendError.
    """
    matrix = classifier_of(model)
    if matrix is not None:
        for vector in model.embed(questions, "last", "none"):
            yield share(*(matrix @ vector))
        return
    choices_of_all = [answer_token(model, word) for word in answers]
    records = (None if ids is None else {"tokens": ids, "choices": choices_of_all} for ids in questions)
    for choices in model.score(records):
        yield share(*(scored.logprob for scored in choices))


def classifier_of(model: Model) -> NDArray[np.float64] | None:
    """The file's classifier, float64 [2, H], whose rows are "yes" and "no"; None where it has none."""
    weight = model.family.shared.get("cls_output")
    return None if weight is None else dequantize(weight.tensor.data, weight.tensor.type).astype(np.float64)


def answer_token(model: Model, word: str) -> list[int]:
    """An answer's token, in a list. Raises InputError where the vocabulary does not have it as one."""
    ids = model.tokenize(word, add_special=False)
    if len(ids) != 1:
        raise InputError(f"{model.file.path}: no reranker: {word!r} is not one token of its vocabulary")
    return ids


def share(yes: float, no: float) -> float:
    """The probability of "yes", by a softmax over both answers' logits or log-probabilities; NaN stays NaN."""
    return 1 / (1 + math.exp(min(no - yes, 700.0)))
