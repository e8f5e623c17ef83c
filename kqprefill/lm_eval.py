"""A model of lm-evaluation-harness (PyPI: lm-eval) that scores with kqprefill.

import lm_eval
from kqprefill.lm_eval import KqprefillLM

results = lm_eval.simple_evaluate(model=KqprefillLM("model.gguf", vram="8G"), tasks=["hellaswag"])

Releases of the harness that look for entry points (`lm_eval.models`) find it as `--model kqprefill` too; with the
others `kqprefill lm-eval` makes it known first. Contexts are split from continuations, and long texts cut into windows,
by the harness' own functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import logging
import os
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .backends import precision_called
from .cli.sources import model_path
from .engine.checks import token_ids
from .engine.model import load
from .engine.scoring import Item
from .errors import BackendError, InputError, ModelError
from .gguf.keys import read_key
from .text import Tokenizer
from .text.chat import Chat

_LOG = logging.getLogger("kqprefill")


class KqprefillLM(TemplateLM):  # type: ignore[misc]  # the harness need not be installed where types are checked
    """A GGUF model as the harness asks for it: log-likelihoods, and no generation."""

    def __init__(
        self,
        path: str | None = None,
        backend: str = "auto",
        device: str | int | None = None,
        kernels: str = "auto",
        vram: str | int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        precision: str | None = None,
        **unknown: Any,
    ) -> None:
        """What `--model_args` may name.

        path: the model, as commands name it; there must be one. backend, kernels, vram: as for `kqprefill.load`.
        device: `--device` of the harness: `cpu`, `cuda`, `cuda:1` or a CUDA device's number. batch_tokens: of a batch,
        at most, as in `Model.score`. max_length: tokens of a context with its continuation, or of a window of a long
        text, at most; the model's context length unless given. add_bos_token: whether texts begin with BOS; as the file
        says unless given. prefix_token_id: what comes before a text without context; BOS unless given, or EOS where
        there is none. batch_size, max_batch_size: of the harness, and not needed: batches are packed by tokens.
        precision: as for `kqprefill.load`; what $KQPREFILL_PRECISION says unless given.

        Raises as `kqprefill.load` does; InputError for an argument that is none; ModelError where the file has no
        tokenizer.
        """
        super().__init__()
        if unknown:
            known = "backend, kernels, vram, precision, batch_tokens, max_length, add_bos_token and prefix_token_id"
            raise InputError(f"model_args: {next(iter(unknown))} is unknown; there are path, {known}")
        if path is None:
            raise InputError("model_args: there is no path; give the model as --model_args path=model.gguf")
        number, backend = _device_of(device, backend)
        self._batch_tokens = batch_tokens
        self._path = model_path(str(path))
        self.model = load(self._path, backend, number, kernels, vram=vram, precision=_precision_of(precision))
        try:
            metadata = self.model.file.metadata
            self._tokenizer = Tokenizer(metadata, self._path)
            self._chat: Chat | None = None
            longest = self.model.config.context_length
            self.max_length = longest if max_length is None else max_length
            if not 2 <= self.max_length <= longest:
                raise InputError(f"max_length={max_length}: 2 to the model's context length {longest} are possible")
            bos, self._eos = (self._named_token(name) for name in ("bos", "eos"))
            self._bos = self._tokenizer.bos if add_bos_token is None else bos if add_bos_token else None
            if add_bos_token and bos is None:
                raise InputError(f"add_bos_token: {self._path} names no BOS")
            self._prefix = next((t for t in (prefix_token_id, bos, self._eos) if t is not None), None)
        except BaseException:
            self.model.close()
            raise

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises ModelError where the file names none."""
        if self._eos is None:
            raise ModelError(f"{self._path}: it names no EOS (tokenizer.ggml.eos_token_id)")
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context. Raises ModelError where the file names neither BOS nor EOS."""
        return self.eot_token_id if self._prefix is None else self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of requests apart by."""
        return self._path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's ids, the texts of special tokens being these tokens.

        With BOS before them, unless they begin with it or add_special_tokens is False; without EOS, which would stand
        between a context and its continuation.
        """
        ids = self._tokenizer.encode(string, add_special=False)
        with_bos = self._bos is not None and add_special_tokens is not False and ids[:1] != [self._bos]
        return [self._bos, *ids] if with_bos and self._bos is not None else ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's text, all its tokens.

        It is cut into windows of at most max_length tokens, the first after the prefix token; each token is scored in
        one of them. Raises as `Model.score` does.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids  # a template may have written it
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Raises InputError: kqprefill has no decoding loop."""
        names = sorted({str(getattr(request, "task_name", None) or "a task") for request in requests})
        raise InputError(
            f"{', '.join(names)}: output_type generate_until asks for text, and kqprefill writes none (it is prefill "
            "only); choose tasks of multiple_choice, loglikelihood or loglikelihood_rolling"
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) the continuation's log-likelihood given the context, and whether each
        of its tokens is the likeliest there.

        All go through one `Model.score`; those with the same context are choices of one record, which share its
        computation. A context that is too long loses its beginning, as with the harness' own models.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        shortened = 0
        for index, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError(f"a continuation adds no token to its context: {texts!r}")
            if len(continuation) > self.max_length:
                length = len(continuation)
                raise InputError(f"a continuation of {length} tokens is past max_length {self.max_length}: {texts!r}")
            room = self.max_length + 1 - len(continuation)  # the last token is not run
            shortened += len(context) > room
            groups.setdefault(tuple(context[-room:]), []).append(index)
        if shortened:
            _LOG.warning("%d of %d contexts are cut at their beginning to fit max_length", shortened, len(requests))
        items = [Item(list(context), [requests[i][2] for i in own], True) for context, own in groups.items()]
        for item in items:
            token_ids([*item.prompt, *(t for c in item.continuations or () for t in c)], self.model.config.vocab_size)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scores = self.model.score(items, self._batch_tokens, top=1)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            for own, choices in zip(groups.values(), scores):
                for index, scored in zip(own, choices):
                    texts = requests[index][0]
                    if not scored.finite:
                        raise BackendError(
                            f"a log-probability is not finite: the weights of {self._path} are damaged or out of range"
                        )
                    found[index] = scored.logprob, bool((scored.top_tokens[:, 0] == scored.tokens).all())
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[index])
                bar.update(len(own))
        return found

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's chat template, for the harness to write down; None where it is not to be used."""
        metadata = self.model.file.metadata
        return read_key(metadata, "tokenizer.chat_template", self._error) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the file's chat template spells it; without add_generation_prompt it ends with the last
        message's text, which the continuation goes on. Raises as `Model.tokenize_chat` does."""
        if self._chat is None:
            self._chat = Chat(self._tokenizer, self.model.file.metadata, self._path, None)
        rendered = self._chat.render([dict(message) for message in chat_history], add_generation_prompt)
        if add_generation_prompt:
            return rendered
        last = str(chat_history[-1].get("content", "")).strip()
        return rendered[: rendered.rindex(last) + len(last)] if last in rendered else rendered

    def _named_token(self, name: str) -> int | None:
        token: int | None = read_key(self.model.file.metadata, f"tokenizer.ggml.{name}_token_id", self._error)
        return token if token is not None and 0 <= token < self.model.config.vocab_size else None

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}")


def _precision_of(given: str | None) -> str:
    """What is given, else what the environment says as it does for our commands, else "exact". Raises InputError."""
    named = os.environ.get("KQPREFILL_PRECISION") or "exact"
    try:
        return precision_called(given or named)
    except InputError as error:
        raise InputError(f"{'model_args' if given else 'KQPREFILL_PRECISION'}: {error}") from None


def _device_of(device: str | int | None, backend: str) -> tuple[int, str]:
    """The CUDA device's number, and the backend where the harness' device is `cpu`.

    The harness says `cuda:0` where its user has said nothing, so `cuda` demands no GPU; a backend of "cuda" does.
    Raises InputError.
    """
    kind, _, number = ("cuda", "", str(device)) if isinstance(device, int) else (device or "").partition(":")
    if kind.isdecimal() and not number:
        kind, number = "cuda", kind
    if kind not in ("", "cpu", "cuda") or not (number or "0").isdecimal():
        raise InputError(f"device {device!r} is unknown; give cpu, cuda or cuda:N")
    return int(number or 0), kind if backend == "auto" and kind == "cpu" else backend
