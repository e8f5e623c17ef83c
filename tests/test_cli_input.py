"""What people give to the command line: records, options, streams that are closed, interrupts; and how it answers."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import EXAMPLE
from kqprefill.cli import _status_of
from kqprefill.cli.commands import cli
from kqprefill.synthetic.shapes import SHAPES
from test_cli import ENTRY, TOKENS, kq, run
from test_cli_score import lines, read, score

OURS = (
    "index n_tokens logprob mean_logprob perplexity best best_per_token error token_logprobs greedy_tokens top_tokens "
    "top_logprobs"
).split()


def answer(*args):
    """The exit status of a command that is run in this process, which is quicker."""
    try:
        return cli(list(map(str, args)), standalone_mode=False) or 0
    except BaseException as error:
        return _status_of(error)


# Records -------------------------------------------------------------------------------------------------------------


def test_a_key_of_a_results_own_is_refused():
    records = [{"tokens": [1, 2], "id": 1, key: 5} for key in OURS]
    done = score(stdin=lines([{"tokens": [1, 2]}, records[0]]))
    assert done.returncode == 1 and len(read(done.stdout)) == 1
    (complaint,) = done.stderr.decode().splitlines()
    assert complaint.startswith('kqprefill: stdin: line 2: the key "index" ') and "--keep-as" in complaint
    found = read(score("--on-error", "skip", stdin=lines(records)).stdout)
    assert [line["error"].split()[:5] for line in found] == [
        ["line", f"{i + 1}:", "the", "key", f'"{key}"'] for i, key in enumerate(OURS)
    ]


def test_error_lines_hold_nothing_that_was_not_found():
    """Neither where the key is refused nor where the record is bad in another way."""
    records = [
        {"tokens": [1, 2], "id": 1, "logprob": -1.0},
        {"tokens": [999], "id": 2, "perplexity": 3.0},
        {"tokens": [1]},
    ]
    done = score("--on-error", "skip", stdin=lines(records))
    assert done.returncode == 3
    first, second, _ = read(done.stdout)
    assert first.keys() == second.keys() == {"index", "error", "id"}
    first, second, third = read(score("--on-error", "skip", "--keep-as", "of", stdin=lines(records)).stdout)
    assert first["of"] == {"id": 1, "logprob": -1.0} and first["logprob"] != -1.0
    assert second.keys() == {"index", "error", "of"} and third["of"] == {}


@pytest.mark.parametrize("name", ["logprob", "index", "choices", ""])
def test_keep_as_takes_no_name_of_a_results_own(name):
    done = score("--keep-as", name, stdin=lines([{"tokens": [1, 2]}]))
    assert done.returncode == 2 and done.stdout == b"" and b"--keep-as" in done.stderr


def test_an_extra_key_that_cannot_be_handed_on_is_a_bad_record():
    extras = [
        (b"1e999", "1e999 is beyond a number's range"),
        (b"-1e999", "-1e999 is beyond"),
        (b"[" * 990 + b"]" * 990, "nested more than 100 deep"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100 deep"),
        (b"[" * 5000 + b"]" * 5000, "line 5: "),
    ]
    if sys.version_info >= (3, 11):  # 3.10 reads and writes integers of any length
        extras.append((b"9" * 5000, "line 6: "))
    data = b"".join(b'{"tokens": [1, 2], "x": %b}\n' % extra for extra, _ in extras)
    done = score("--on-error", "skip", stdin=data + b'{"tokens": [1, 2]}\n')
    assert done.returncode == 3 and b"Traceback" not in done.stderr
    *bad, good = read(done.stdout)
    assert good["n_tokens"] == 1
    for line, (_, why) in zip(bad, extras):
        assert why in line["error"] and "x" not in line


def test_what_may_be_nested_is_handed_on():
    deep = json.loads("[" * 90 + "]" * 90)
    done = score("--keep-as", "of", stdin=lines([{"tokens": [1, 2], "x": deep, "many": [[]] * 200}]))
    assert done.returncode == 0 and read(done.stdout)[0]["of"] == {"x": deep, "many": [[]] * 200}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    bom, text = b"\xef\xbb\xbf", tmp_path / "text"
    plain = score(stdin=b'{"prompt": "Hello"}\n')
    assert score(stdin=bom + b'{"prompt": "Hello"}\n').stdout == plain.stdout
    text.write_bytes(bom + b"Hello")
    (tmp_path / "ids").write_bytes(bom + TOKENS.encode())
    expected = run("--prompt", "Hello").stdout
    assert run("--prompt", f"@{text}").stdout == run("-f", text).stdout == expected
    assert run("--prompt", "-", stdin=bom + b"Hello").stdout == expected
    assert run("--tokens", f"@{tmp_path / 'ids'}").stdout == expected
    assert kq("tokenize", EXAMPLE, "-f", text).stdout.decode() == TOKENS + "\n"


def test_several_files_are_one_corpus(tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    records = [{"tokens": [1, 2, i]} for i in range(5)]
    one.write_bytes(lines(records[:2])[:-1])  # its last line has no end
    two.write_bytes(b"\xef\xbb\xbf" + lines(records[2:]))
    whole = score(stdin=lines(records)).stdout
    assert score(one, two).stdout == score(one, "-", stdin=lines(records[2:])).stdout == whole
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert score(one, two, "-o", out, "--resume").returncode == 0 and out.read_bytes() == whole
    two.write_bytes(b"\nx\n")
    done = score(one, two)
    assert done.returncode == 1 and done.stderr.decode().startswith(f"kqprefill: {two}: line 2: no JSON: ")
    assert f"{two}: line 2: " in read(score(one, two, "--on-error", "skip").stdout)[2]["error"]
    done = score(one, tmp_path / "absent")
    assert done.returncode == 1 and done.stdout == b"" and b"absent: No such file" in done.stderr
    assert score(one, tmp_path).returncode == 1 and score("-", "-").returncode == 2


def test_a_syntax_error_names_one_place():
    """Not "line 2", and then "line 1" of that."""
    complaint = score(stdin=b'{"tokens": [1]}\n{"tokens": }\n').stderr.decode()
    assert complaint == "kqprefill: stdin: line 2: no JSON: Expecting value (character 12 of the line)\n"


# Options -------------------------------------------------------------------------------------------------------------


def test_ids_are_digits():
    from kqprefill.cli.common import read_tokens
    from kqprefill.errors import InputError

    assert run("--tokens", "1_0,٣").returncode == 2
    for ids in ("1_0", "٣", "1 ٣", "+1", "1.0", "0x1", "１", "9" * 5000):
        with pytest.raises(InputError, match="is not a token id") as refused:
            read_tokens(ids)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "args,complaint",
    [
        (["run", EXAMPLE, "--tokens", "1", "--vram", "9" * 400], "memory budget"),
        (["run", EXAMPLE, "--tokens", "1", "--vram", "٣G"], "memory budget"),
        (["bench", "tiny", "--delay", "nan"], "--delay"),
        (["bench", "tiny", "-p", "1_0"], "'1_0' is not a prompt length"),
        (["bench", "tiny", "-p", ""], "'' is not a prompt length"),
        (["plan", "qwen3-8b", "--vram", "80G", "-p", "1,2"], "one length"),
        (["run", EXAMPLE, "--prompt", "a", "--prompt", "b"], "--prompt is given 2 times"),
        (["run", EXAMPLE, "--prompt", "a", "-p", "b"], "--prompt is given 2 times"),
        (["run", EXAMPLE, "--tokens", "1", "--tokens", "2"], "--tokens is given 2 times"),
        (["score", EXAMPLE, "-o", "a", "-o", "b"], "--output is given 2 times"),
        (["plan", "qwen3-8b", "--vram", "80G", "-p", "1", "-p", "2"], "--prompt is given 2 times"),
        (["run", EXAMPLE, "--tokens", "1", "--top", "2", "--text"], "--top and --text"),
        (["run", EXAMPLE, "--tokens", "1", "-f", "x"], "once"),
        (["tokenize", EXAMPLE, "Hello", "-f", "x"], "--file"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_what_is_refused(args, complaint, capfd):
    assert answer(*args) == 2
    out, err = capfd.readouterr()
    assert out == "" and complaint in err and "Traceback" not in err


def test_lengths_accumulate():
    done = kq("bench", "tiny", "-p", 4, "-p", "8,16", "-r", 1, "--backend", "cpu", "-o", "jsonl")
    assert [row["prompt_tokens"] for row in read(done.stdout)] == [4, 8, 16]


@pytest.mark.parametrize(
    "args",
    [
        ["run", "/no/such.gguf", "--tokens", "1"],
        ["run", EXAMPLE, "--tokens", "@/no/such"],
        ["run", EXAMPLE, "--prompt", "@/no/such"],
        ["run", EXAMPLE, "-f", "/no/such"],
        ["score", "/no/such.gguf"],
        ["score", EXAMPLE, "/no/such"],
        ["perplexity", EXAMPLE, "--file", "/no/such"],
        ["perplexity", EXAMPLE, "--tokens", "@/no/such"],
        ["tokenize", EXAMPLE, "@/no/such"],
        ["tokenize", "/no/such.gguf", "Hello"],
        ["bench", "/no/such.gguf"],
        ["plan", "/no/such.gguf"],
        ["inspect", "/no/such.gguf"],
    ],
    ids=range(13),
)
def test_a_file_that_is_not_there_has_one_status(args, capfd):
    assert answer(*args) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "/no/such" in err and "No such file" in err


def test_what_the_cpu_ignores_is_said():
    done = run("--tokens", "1", "--vram", "8G", "--device", "3")
    assert (done.returncode, done.stderr) == (0, b"kqprefill: --device and --vram: ignored on the CPU\n")
    assert run("--tokens", "1", "--vram", "8G", "-q").stderr == b"" == run("--tokens", "1").stderr


def test_the_notice_of_the_cpu_is_in_our_words():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*ENTRY, "run", EXAMPLE, "--tokens", "1"], env=environment, capture_output=True)
    assert re.fullmatch(rb"kqprefill: running on the CPU: [\w ]+(\(\w+\))?; a GPU needs .* 580 or later\n", done.stderr)


# Streams and interrupts ----------------------------------------------------------------------------------------------


def closed(redirection, *args):
    """A command with a stream closed."""
    command = " ".join(f"'{word}'" for word in [*ENTRY, *map(str, args)])
    return subprocess.run(f"{command} {redirection}", shell=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(redirection, tmp_path):
    out = tmp_path / "out.npy"
    done = closed(redirection, "run", EXAMPLE, "--tokens", TOKENS, "--backend", "cpu", "--logits", out)
    assert b"Traceback" not in done.stderr and out.read_bytes()[:6] == b"\x93NUMPY" and out.stat().st_size == 1152
    if ">&-" in redirection.split():  # the token is lost
        assert done.returncode == 1
        assert done.stderr == (b"" if "2" in redirection else b"kqprefill: stdout: it is closed\n")
    else:
        assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize(
    "args", [["run", EXAMPLE, "--prompt", "-"], ["run", EXAMPLE, "--tokens", "-"], ["score", EXAMPLE]]
)
def test_a_closed_stdin_that_is_wanted(args):
    done = closed("<&-", *args, "--backend", "cpu")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"it is closed" in done.stderr


def test_stderr_that_is_full_stops_nothing():
    with open("/dev/full", "wb") as full:
        command = [*ENTRY, "run", str(EXAMPLE), "--tokens", TOKENS, "-v"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full)
        assert done.returncode == 0 and done.stdout
        assert subprocess.run([*ENTRY, "run", str(EXAMPLE), "--tokens", "x"], stderr=full).returncode == 2


def test_a_prompt_may_be_piped():
    assert run(stdin=b"Hello").stdout == run("--prompt", "Hello").stdout == run("-p", "Hello").stdout
    text = b"Hello there. " * 20
    found = kq("perplexity", EXAMPLE, "-c", 64, "--backend", "cpu", stdin=text)
    assert found.returncode == 0 and found.stdout == kq("perplexity", EXAMPLE, "-c", 64, "-f", "-", stdin=text).stdout
    done = subprocess.run([*ENTRY, "run", EXAMPLE], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 2 and b"--prompt TEXT" in done.stderr


@pytest.mark.parametrize(
    "module", ["click", "kqprefill.cli.commands", "kqprefill.cli.score", "numpy", "kqprefill.engine.model"]
)
def test_an_interrupt_while_importing_is_quiet(module):
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from kqprefill.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "run", EXAMPLE, "--tokens", "1", "--backend", "cpu"],
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ignored_interrupts_stay_ignored():
    """As those of nohup."""
    command = [*ENTRY, "score", str(EXAMPLE), "--backend", "cpu"]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=ignore) as process:
        process.stdin.write(b'{"tokens": [1, 2]}\n')
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdin.write(b'{"tokens": [1, 2]}\n')
        process.stdin.close()
        assert process.stdout.read().count(b"\n") == 1
    assert process.returncode == 0


def test_an_error_of_our_own_is_a_line(tmp_path):
    """And a traceback where it is asked for."""
    code = """
import sys
import kqprefill.engine.model as model
def broken(*_, **__): raise KeyError("x\\x1b")
model.open_model = broken
from kqprefill.cli import main
main()
"""
    command = [sys.executable, "-c", code, "run", EXAMPLE, "--tokens", "1"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"KeyError" in done.stderr
    assert b"Traceback" in subprocess.run([*command, "-v"], capture_output=True).stderr


# plan ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_that_plan_advises_is_enough(shape):
    """As it is printed."""
    from kqprefill.backends.budget import Budget
    from kqprefill.backends.cuda.bounds import H100
    from kqprefill.backends.cuda.kernel_set import kernel_set_of
    from kqprefill.backends.cuda.rehearsal import plan_model
    from kqprefill.errors import BackendError
    from kqprefill.models import read_model
    from kqprefill.synthetic import SyntheticFile

    kernels = kernel_set_of(H100.capability)
    for recipe in ("Q4_K_M", "Q8_0"):
        family = read_model(SyntheticFile.named(f"{shape}:{recipe}"))
        for tokens in (1, 100, 4096):
            with pytest.raises(BackendError) as refused:
                plan_model(family, H100, kernels, 1 << 20, tokens)
            words = re.search(r"a budget of ([0-9.]+ GiB) \(--vram ([0-9.]+G)\)", str(refused.value))
            for budget in words.groups():
                plan = plan_model(family, H100, kernels, Budget.parse(budget).of(0), tokens)
                assert plan.nbytes <= plan.budget < plan.nbytes + 2**30 / 99


def test_plan_on_the_cpu():
    done = kq("plan", EXAMPLE, "--backend", "cpu", "-p", 100, "--vram", "1G")
    assert done.returncode == 0 and b"nothing is planned" in done.stdout
    assert done.stderr == b"kqprefill: --vram: ignored on the CPU\n"
    found = json.loads(kq("plan", EXAMPLE, "--backend", "cpu", "-p", 100, "--json").stdout)
    assert found["device"] == "cpu" and found["parts"]["weights"] > 700_000 and found["prompt_tokens"] == 100
