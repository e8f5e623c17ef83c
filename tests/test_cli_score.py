"""`kqprefill score` and `perplexity` through their real entry point: what they write, and leave when they fail."""

import json
import math
import os
import resource
import signal
import subprocess
import time

import numpy as np
import pytest

from conftest import EXAMPLE, log_softmax
import kqprefill
from test_cli import ENTRY, kq

EXTRA = {"id": "a b", "meta": {"x": [1, None, 2.5]}, "note": "é\ud800"}


def score(*args, stdin=None, **kwargs):
    return kq("score", EXAMPLE, "--backend", "cpu", *args, stdin=stdin, **kwargs)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(data):
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def model():
    with kqprefill.load(EXAMPLE, backend="cpu") as model:
        yield model


def expected(model, ids, given=1):
    logprobs = log_softmax(model.prefill(ids, logits="all").logits)
    return logprobs[np.arange(given - 1, len(ids) - 1), ids[given:]]


def test_a_line_for_each_record(model):
    prompt, more = model.tokenize("Hello there"), model.tokenize(", you")
    records = [
        {"prompt": "Hello there", **EXTRA},
        {"tokens": prompt},
        {"prompt": "Hello there", "completion": ", you"},
        {"tokens": prompt, "choices": [more, more[:1]]},
        {"tokens": [7]},
    ]
    done = score("--per-token", "--greedy", "--top", 2, stdin=b"\n" + lines(records) + b"  \n")
    assert (done.returncode, done.stderr) == (0, b"")
    found = read(done.stdout)
    assert [line["index"] for line in found] == [0, 1, 2, 3, 4]
    whole, completion = expected(model, prompt), expected(model, prompt + more, len(prompt))
    first = found[0]
    assert {key: first[key] for key in EXTRA} == EXTRA and "prompt" not in first
    assert first["n_tokens"] == len(whole) and np.allclose(first["token_logprobs"], whole, atol=1e-4)
    assert first["logprob"] == pytest.approx(whole.sum(), abs=1e-3)
    assert first["mean_logprob"] == pytest.approx(first["logprob"] / len(whole))
    assert first["perplexity"] == pytest.approx(math.exp(-first["mean_logprob"]))
    logits = model.prefill(prompt, logits="all").logits[:-1]
    assert first["greedy_tokens"] == logits.argmax(-1).tolist()
    assert [t[0] for t in first["top_tokens"]] == first["greedy_tokens"] and len(first["top_logprobs"][0]) == 2
    assert {**found[1], "index": 0, **EXTRA} == first
    assert np.allclose(found[2]["token_logprobs"], completion, atol=1e-4)
    choices = found[3]["choices"]
    assert [c["n_tokens"] for c in choices] == [len(more), 1]
    assert choices[0]["logprob"] == pytest.approx(completion.sum(), abs=1e-3)
    assert found[3]["best"] == int(np.argmax([c["logprob"] for c in choices]))
    assert found[3]["best_per_token"] == int(np.argmax([c["mean_logprob"] for c in choices]))
    assert found[4] == {
        "index": 4,
        "n_tokens": 0,
        "logprob": 0.0,
        "mean_logprob": None,
        "perplexity": None,
        "token_logprobs": [],
        "greedy_tokens": [],
        "top_tokens": [],
        "top_logprobs": [],
    }


def test_batches_change_nothing(rng):
    records = [{"tokens": rng.integers(0, 256, rng.integers(1, 200)).tolist(), "i": i} for i in range(60)]
    whole, small = (score("--batch-tokens", n, "--per-token", stdin=lines(records)) for n in (8192, 50))
    assert whole.returncode == 0 and whole.stdout == small.stdout
    assert [line["i"] for line in read(whole.stdout)] == list(range(60))


BAD = [
    (b'{"prompt": "x"', "no JSON"),
    (b"[1, 2]", "must be a JSON object"),
    (b'{"promt": "x"}', "tokens"),
    (b'{"tokens": [999]}', "vocabulary"),
    (b'{"tokens": [1], "x": NaN}', "NaN"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b"[" * 100_000, "no JSON"),
    (b'{"prompt": "\\ud800"}', "UTF-8"),
]


@pytest.mark.parametrize("bad,why", BAD, ids=range(len(BAD)))
def test_a_bad_line_stops(bad, why):
    done = score(stdin=b'{"tokens": [1, 2]}\n\n' + bad + b'\n{"tokens": [3, 4]}\n')
    assert done.returncode == 1 and len(read(done.stdout)) == 1  # what came before it is there
    (complaint,) = done.stderr.decode().splitlines()
    assert complaint.startswith("kqprefill: stdin: line 3: ") and why in complaint


def test_bad_lines_can_be_skipped():
    done = score("--on-error", "skip", stdin=b"".join(bad + b'\n{"tokens": [3, 4]}\n' for bad, _ in BAD))
    assert done.returncode == 3
    found = read(done.stdout)
    assert [line["index"] for line in found] == list(range(2 * len(BAD)))
    for line, (_, why) in zip(found[::2], BAD):
        assert why in line["error"] and f"line {line['index'] + 1}: " in line["error"]
    assert all("logprob" in line for line in found[1::2])
    assert f"{len(BAD)} of {2 * len(BAD)} records".encode() in done.stderr


def test_damaged_weights_are_said(tmp_path):
    from kqprefill.gguf import GGUFFile

    raw = bytearray(EXAMPLE.read_bytes())
    with GGUFFile(EXAMPLE) as file:
        at = file.tensors["output_norm.weight"].offset
    raw[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "damaged.gguf").write_bytes(raw)
    done = kq("score", tmp_path / "damaged.gguf", "--backend", "cpu", stdin=b'{"tokens": [1, 2]}\n')
    assert done.returncode == 1 and b"line 1" in done.stderr and b"NaN" in done.stderr and not done.stdout


def test_lines_come_as_they_are_ready():
    """Whoever feeds a pipe line by line gets each answer before giving the next."""
    with subprocess.Popen(
        [*ENTRY, "score", EXAMPLE, "--backend", "cpu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        for index in range(3):
            process.stdin.write(b'{"tokens": [1, 2, 3]}\n')
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["index"] == index
        process.stdin.close()
        assert process.stdout.read() == b""


def test_a_pipe_that_stays_open_is_answered():
    """All that it has given, of several batches and less than one, though more may come."""
    with subprocess.Popen(
        [*ENTRY, "score", EXAMPLE, "--backend", "cpu", "--batch-tokens", "100"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        for count in (25, 11, 10, 1):
            process.stdin.write(lines([{"tokens": [1] * 10}] * count))
            process.stdin.flush()
            assert len([process.stdout.readline() for _ in range(count)]) == count
        process.stdin.close()
        assert process.stdout.read() == b""


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_input(tmp_path_factory, module_rng):
    """(a file of records that take some seconds, what comes of it)."""
    rng, folder = module_rng, tmp_path_factory.mktemp("long")
    records = [{"tokens": rng.integers(0, 256, rng.integers(1, 120)).tolist(), "i": i} for i in range(400)]
    records[7] = {"tokens": [1, 2], "choices": [[3], [4, 5]], "i": 7}
    (folder / "in.jsonl").write_bytes(lines(records))
    done = score(folder / "in.jsonl", "--batch-tokens", 200)
    assert done.returncode == 0
    return folder / "in.jsonl", done.stdout


def start(path, out, *more):
    return subprocess.Popen(
        [*ENTRY, "score", EXAMPLE, path, "-o", out, "--batch-tokens", "200", "--backend", "cpu", *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_lines(process, out):
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)


def test_killed_and_resumed_nothing_is_lost_or_twice(long_input, tmp_path, rng):
    path, whole = long_input
    out, kills = tmp_path / "out.jsonl", 0
    for _ in range(6):
        process = start(path, out, *(["--resume"] if out.exists() else []))
        wait_for_lines(process, out)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if rng.random() < 0.5:  # as if it had been killed within a line
            os.truncate(out, max(0, out.stat().st_size - int(rng.integers(60))))
    assert kills
    process = start(path, out, "--resume")
    assert process.communicate()[1] == b"" and process.returncode == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_lines(long_input, tmp_path, number, status):
    path, whole = long_input
    out = tmp_path / "out.jsonl"
    process = start(path, out, "--html", tmp_path / "page.html")
    wait_for_lines(process, out)
    process.send_signal(number)
    said, done = process.communicate()[1], out.read_bytes().count(b"\n")
    assert said.decode() == f"kqprefill: interrupted: {done} records are done in {out}; --resume goes on from there\n"
    assert process.returncode == status
    assert whole.startswith(out.read_bytes()) and out.read_bytes().endswith(b"\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]  # no half of a page
    assert len(out.read_bytes()) < len(whole)


def test_whoever_reads_may_go(long_input):
    path, whole = long_input
    command = " ".join(map(str, [*ENTRY, "score", EXAMPLE, path, "--batch-tokens 200 --backend cpu | head -n 2"]))
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert done.stdout.splitlines() == whole.splitlines()[:2] and done.stderr == b""


def limited(nbytes):
    """Files of at most so many bytes: writing more fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def test_a_full_disk_and_resuming(long_input, tmp_path):
    path, whole = long_input
    out = tmp_path / "out.jsonl"
    command = [*ENTRY, "score", str(EXAMPLE), str(path), "-o", str(out), "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, preexec_fn=limited(5000))
    assert done.returncode == 1 and b"out.jsonl cannot be written: " in done.stderr and done.stderr.count(b"\n") == 1
    assert out.stat().st_size == 5000 and whole.startswith(out.read_bytes())
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    assert out.read_bytes() == whole


def test_stdout_that_is_full():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*ENTRY, "score", EXAMPLE, "--backend", "cpu"],
            input=b'{"tokens": [1, 2]}\n',
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"stdout cannot be written" in done.stderr


def test_outputs_are_not_overwritten_or_mixed_up(long_input, tmp_path):
    path, whole = long_input
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    part = b"".join(whole.splitlines(keepends=True)[:8])

    def refused(*args, content=part, source=path):
        out.write_bytes(content)
        done = score(source, "-o", out, *args)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and out.read_bytes() == content, done.stderr
        return done.stderr.decode()

    assert "--resume" in refused()
    assert "other options" in refused("--resume", "--per-token")
    assert "line 2 is no result" in refused("--resume", content=whole.splitlines(keepends=True)[0] + b"{}\n")
    records = read(path.read_bytes())
    other.write_bytes(lines(records[:3]))
    assert "has 3 records, but the output to continue has 8" in refused("--resume", source=other)
    other.write_bytes(lines([*records[:6], {"tokens": [1] * 150, "i": 6}, {"tokens": [1, 2], "i": 7}, *records[8:]]))
    assert "another record" in refused("--resume", source=other)
    out.unlink()
    assert kq("score", tmp_path / "no.gguf", path, "-o", out, "--backend", "cpu").returncode == 1 and not out.exists()
    assert score(path, "--resume").returncode == 2
    assert score(tmp_path / "absent.jsonl").returncode == 1


def test_two_processes_do_not_write_one_output(long_input, tmp_path):
    path, _ = long_input
    out = tmp_path / "out.jsonl"
    first = start(path, out)
    wait_for_lines(first, out)
    second = start(path, out, "--resume")
    assert b"another process is writing it" in second.communicate()[1] and second.returncode == 2
    first.kill()
    first.communicate()


def test_reading_ahead_is_bounded(tmp_path):
    """A corpus is not read into memory while its first texts are scored."""
    from kqprefill.cli import records

    class Item:
        tokens = 10_000

    (tmp_path / "in").write_bytes(b'{"tokens": []}\n' * 500)
    made = []
    reader = records.Records([str(tmp_path / "in")], lambda content: made.append(1) or Item())
    taken = iter(reader)
    for count in range(1, 30):
        next(taken)
        time.sleep(0.002)
        assert len(made) <= count + records._AHEAD // 10_000 + 2
    assert sum(record is not None for record in taken) == 500 - 29


# The page, and perplexity --------------------------------------------------------------------------------------------


def test_the_page_shows_and_escapes(tmp_path):
    page = tmp_path / "page.html"
    records = [{"prompt": "<script>alert(1)</script>\n& more"}, {"prompt": "yes", "choices": [" or no", "?"]}]
    done = score("--html", page, stdin=lines(records))
    assert done.returncode == 0 and len(read(done.stdout)) == 2
    text = page.read_text(encoding="utf-8")
    assert text.count('<bdi class="t s') >= len(records[0]["prompt"]) + 6 and "alert(1)" not in text  # a token a byte
    assert text.count("<script>") == 1 and "record 1, choice 1" in text
    assert not any(word in text for word in ("http://", "https://", "src=", "@import"))  # nothing from elsewhere


def test_perplexity_is_llama_cpps(model, tmp_path, rng):
    """By its definition: of windows one after another the second half, each token given the window so far."""
    text = "".join(rng.choice(list("abc de\n"), 700))
    (tmp_path / "text").write_text(text)
    ids = model.tokenize(text)
    surprisal = np.concatenate([-expected(model, ids[at : at + 64])[32:] for at in range(0, len(ids) - 63, 64)])
    n = len(surprisal)
    done = kq("perplexity", EXAMPLE, "--file", tmp_path / "text", "-c", 64, "--json", "--backend", "cpu")
    found = json.loads(done.stdout)
    assert (found["n_tokens"], found["windows"]) == (n, len(ids) // 64) and n == (len(ids) // 64) * 31
    value = math.exp(surprisal.mean())
    assert found["perplexity"] == pytest.approx(value, rel=1e-5)
    error = value * math.sqrt((np.square(surprisal).mean() - surprisal.mean() ** 2) / (n - 1))
    assert found["stderr"] == pytest.approx(error, rel=1e-4)
    printed = kq("perplexity", EXAMPLE, "--tokens", ",".join(map(str, ids)), "-c", 64, "--backend", "cpu")
    assert printed.stdout.decode() == f"PPL = {found['perplexity']:.4f} +/- {found['stderr']:.5f}\n"
    assert (
        json.loads(
            kq("perplexity", EXAMPLE, "--file", "-", "-c", 64, "--chunks", 2, "--json", stdin=text.encode()).stdout
        )["windows"]
        == 2
    )


def test_windows_begin_with_bos(tmp_path):
    """Where the file asks for it."""
    from kqprefill.engine.perplexity import perplexity

    class Model:
        class config:
            context_length, vocab_size = 100, 50

        def score(self, records, batch_tokens, progress, starts):
            self.records = list(records)
            return iter([type("S", (), {"logprobs": np.full(3, -1.0, np.float32)}) for _ in self.records])

    model = Model()
    found = perplexity(model, range(10, 31), context=8, bos=1)
    assert model.records == [
        {"tokens": [1, 11, 12, 13, 14], "completion": [15, 16, 17]},
        {"tokens": [1, 19, 20, 21, 22], "completion": [23, 24, 25]},
    ]
    assert found.value == pytest.approx(math.e) and found.n_tokens == 6 and found.windows == 2


@pytest.mark.parametrize(
    "args,complaint",
    [
        (["--tokens", "1,2,3"], "one window takes 512"),
        (["--tokens", "1,2,3", "-c", 3], "4 to the model's"),
        ([], "--file"),
        (["--tokens", "1", "--file", "x"], "either"),
    ],
)
def test_perplexity_refuses(args, complaint):
    done = kq("perplexity", EXAMPLE, "--backend", "cpu", *args)
    assert done.returncode == 2 and complaint in done.stderr.decode()


def test_a_text_that_is_not_there():
    done = kq("perplexity", EXAMPLE, "--backend", "cpu", "--file", "absent")
    assert (done.returncode, done.stderr) == (1, b"kqprefill: --file absent: No such file or directory\n")
