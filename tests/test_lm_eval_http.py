"""lm-evaluation-harness through `kqprefill serve`: its models for servers give what our class gives in its process."""

from dataclasses import dataclass

import pytest

from conftest import EXAMPLE
from test_lm_eval import write_tasks
from test_serve_http import served

pytest.importorskip("lm_eval", reason="needs pip install '.[lm-eval]'")
pytest.importorskip("tenacity", reason="needs pip install 'lm-eval[api]'")
pytest.importorskip("aiohttp", reason="needs pip install 'lm-eval[api]'")

LEAST = 1e-6  # of a choice's sum


@pytest.fixture(scope="module", autouse=True)
def same_bits():
    """On the CPU a server's batches, which are packed otherwise, have the same bits if it is told so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KQPREFILL_SAME_BITS", "1")
        yield


@dataclass
class Found:
    """results: of the task; answers: of each context and continuation (log-likelihood, whether it is greedy)."""

    results: dict
    answers: dict


def evaluate(folder, model, options=None, task="kq_choices"):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, model_args=options, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    answers = {}
    for sample in found["samples"][task]:
        answers |= {tuple(asked): answer for asked, (answer,) in zip(sample["arguments"], sample["resps"], strict=True)}
    return Found(found["results"][task], answers)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, 12)
    return folder


@pytest.fixture(scope="module")
def in_process(tasks):
    from kqprefill.lm_eval import KqprefillLM

    lm = KqprefillLM(str(EXAMPLE), backend="cpu")
    with lm.model:
        return evaluate(tasks, lm)


@pytest.mark.parametrize("options", [(), ("--tokenize-bos",)])
def test_local_completions(tasks, in_process, monkeypatch, options):
    """The example's file asks for no BOS, so that --tokenize-bos changes nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with served(*options) as server:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        found = evaluate(tasks, "local-completions", f"base_url={url},model=any,num_concurrent=4,max_retries=1")
    assert found.answers.keys() == in_process.answers.keys()
    for asked, (logprob, greedy) in found.answers.items():
        assert (
            logprob == pytest.approx(in_process.answers[asked][0], abs=LEAST) and greedy == in_process.answers[asked][1]
        )
    assert found.results["acc,none"] == in_process.results["acc,none"]


def test_rolling(tasks, monkeypatch):
    """Of texts that fit a window."""
    from kqprefill.lm_eval import KqprefillLM

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm = KqprefillLM(str(EXAMPLE), backend="cpu")
    with lm.model:
        expected = evaluate(tasks, lm, task="kq_texts")
    with served() as server:
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        found = evaluate(tasks, "local-completions", f"base_url={url},model=any,max_retries=1", "kq_texts")
    key = "byte_perplexity,none"
    assert found.results[key] == pytest.approx(expected.results[key], rel=1e-6)


def test_gguf(tasks, in_process):
    """It parts a context from its continuation by characters: not where the context is empty, or ends in a space."""
    from lm_eval.models.gguf import GGUFLM, get_result

    with served() as server:
        lm = GGUFLM(f"http://127.0.0.1:{server.port}")
        compared = 0
        for (context, continuation), (logprob, greedy) in in_process.answers.items():
            if context and context == context.rstrip():
                (choice,) = lm.gguf_completion(context, continuation)["choices"]
                found = get_result(choice["logprobs"], len(context))
                assert found[0] == pytest.approx(logprob, abs=LEAST) and found[1] == greedy
                compared += 1
        assert compared >= 20
