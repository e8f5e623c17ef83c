"""Other ways into the same batches: lm-evaluation-harness' requests, and vectors, beside Model.score on the same ids.

python tests/bench/jobs.py [SHAPE:RECIPE] [BACKEND] [COUNT]

COUNT (2000) questions of 100 tokens with four choices of 20, and COUNT prompts of 50 to 2000 tokens. The harness need
not be installed: only the class that it would call is measured, from its token ids on, with its own shape of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np

from kqprefill.cli.common import open_file
from kqprefill.engine.model import Model, open_model
from kqprefill.engine.scoring import Item

CHOICES, CONTEXT, CONTINUATION, SHORTEST, LONGEST = 4, 100, 20, 50, 2000

rng = np.random.default_rng(0)  # the same input in every run, so that runs compare


class _Bar:
    """A progress bar that shows nothing, in tqdm's place."""

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: int) -> None:
        """Show nothing."""


class _Hook:
    """The harness' cache of answers, which keeps none."""

    def add_partial(self, *_: Any) -> None:
        """Keep nothing."""


def stand_in_for_the_harness() -> None:
    """Modules of the names that kqprefill.lm_eval imports, where they are not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        contents: dict[str, dict[str, Any]] = {
            "lm_eval": {},
            "lm_eval.api": {},
            "lm_eval.api.model": {"TemplateLM": object},
            "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
            "tqdm": {"tqdm": _Bar},
        }
        for name, content in contents.items():
            sys.modules[name] = module = ModuleType(name)
            module.__dict__.update(content)


def harness_model(model: Model) -> Any:
    """A KqprefillLM over a model that is open; made without a file, which a shape has not."""
    stand_in_for_the_harness()
    from kqprefill.lm_eval import KqprefillLM

    own = KqprefillLM.__new__(KqprefillLM)
    own.model, own.max_length, own.cache_hook = model, model.config.context_length, _Hook()
    own._path, own._batch_tokens = "a shape", None
    return own


def ids_of(model: Model, length: int) -> list[int]:
    """Token ids."""
    ids: list[int] = rng.integers(0, model.config.vocab_size, length).tolist()
    return ids


def seconds(work: Callable[[], object]) -> float:
    """The best of three."""
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def questions(model: Model, count: int) -> Iterator[Item]:
    """Contexts with choices."""
    for _ in range(count):
        choices = [ids_of(model, CONTINUATION) for _ in range(CHOICES)]
        yield Item(ids_of(model, CONTEXT), choices, True)


def main(name: str = "qwen3-8b:Q4_K_M", backend: str = "cuda", count: str = "2000") -> None:
    """Print questions a second through the harness' class and through score, and tokens a second of both kinds."""
    number = int(count)
    with open_model(open_file(name), backend, ranks=True) as model:
        items = list(questions(model, number))
        requests = [(("c", "d"), item.prompt, choice) for item in items for choice in item.continuations or ()]
        harness = harness_model(model)
        answers = harness._loglikelihood_tokens(requests, disable_tqdm=True)  # compiles, and takes memory
        expected = [scored.logprob for own in model.score(items, top=1) for scored in own]
        assert [answer[0] for answer in answers] == expected, "the harness' class and score differ"
        through = seconds(lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True))
        scored = seconds(lambda: list(model.score(items)))
        longest = min(LONGEST, model.config.context_length)
        prompts = [ids_of(model, length) for length in rng.integers(min(SHORTEST, longest), longest + 1, number)]
        tokens = sum(map(len, prompts))
        list(model.embed(prompts[:100], "last"))
        vectors = seconds(lambda: list(model.embed(prompts, "last")))
        plain = seconds(lambda: list(model.score([{"tokens": prompt} for prompt in prompts])))
        where = f"{model.backend.name} ({model.backend.device_name})"
    print(f"{name}, {where}, {number} questions and prompts")
    print(f"embed {tokens / vectors:.0f} tokens/s, score {tokens / plain:.0f}: {plain / vectors:.3f} of score's rate")
    print(
        f"lm-eval {number / through:.1f} questions/s, score {number / scored:.1f}: "
        f"{scored / through:.3f} of score's rate, {model.backend.name}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
