"""Conversations by chat templates, which nobody vouches for; texts of control tokens; ids back to text."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import EXAMPLE
import kqprefill
from kqprefill.gguf.vocabulary import byte_pieces
from kqprefill.synthetic import SyntheticFile, write_gguf
from kqprefill.text import Tokenizer
from kqprefill.text.chat import Chat
from test_cli import ENTRY, kq
from test_cli_score import lines, read

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": " Hi <|end|> there "}]
BOS, START, END, TAG = range(256, 260)
VALUES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": [*byte_pieces(), "<s>", "<|start|>", "<|end|>", "<tag>"],
    "tokenizer.ggml.token_type": np.array([1] * 256 + [3, 3, 3, 4], np.int32),
    "tokenizer.ggml.bos_token_id": BOS,
    "tokenizer.ggml.add_bos_token": True,
}
BYTE = {piece: i for i, piece in enumerate(byte_pieces())}


def spelled(text):
    """The ids of a text, a token a byte; what is in braces is a special token."""
    ids = []
    for part in re.split("({[A-Z]+})", text):
        ids += (
            [{"{BOS}": BOS, "{START}": START, "{END}": END, "{TAG}": TAG}[part]]
            if part.startswith("{")
            else [BYTE[byte_pieces()[b]] for b in part.encode()]
        )
    return ids


def chat_of(template=TEMPLATE, **more):
    values = {**VALUES, "tokenizer.chat_template": template, **more}
    return Chat(Tokenizer(values, "test"), values, "test", None)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The example's shape, with a template of its own."""
    file = SyntheticFile.named("tiny:Q4_0")
    file.metadata["tokenizer.chat_template"] = TEMPLATE
    file.metadata["tokenizer.chat_template.tool_use"] = "{{ raise_exception('another use') }}"
    path = tmp_path_factory.mktemp("chat") / "chat.gguf"
    write_gguf(file, path)
    return path


def test_a_conversation_is_what_the_template_writes():
    with chat_of() as chat:
        assert chat.render(ASKED, True) == "<s><|start|>user\nHi <|end|> there<|end|>\n<|start|>assistant\n"
        assert chat.encoder(ASKED, False)("") == spelled("{BOS}{START}user\nHi {END} there{END}\n")
        assert chat.encoder(ASKED, True)("A<|end|>")[-12:] == spelled("assistant\nA{END}")


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_bos_stands_once(template):
    with chat_of(template) as chat:
        assert chat.encoder(ASKED, True)("").count(BOS) == 1


def test_control_tokens_of_the_messages_are_text_where_that_is_asked_for():
    with chat_of() as chat:
        ids = chat.encoder([{"role": "user", "content": "<|end|>é<s><tag>"}], True, False)("<|start|>")
        assert ids == spelled("{BOS}{START}user\n<|end|>é<s>{TAG}{END}\n{START}assistant\n<|start|>")


def test_a_mark_that_the_messages_hold_is_not_taken():
    content = "".join(map(chr, range(0xFDD0, 0xFDEF))) + "<|end|>"
    with chat_of() as chat:
        ids = chat.encoder([{"role": "user", "content": content}], False, False)("")
        assert ids == spelled(f"{{BOS}}{{START}}user\n{content}{{END}}\n")
        with pytest.raises(kqprefill.InputError, match="U\\+FDD0"):
            chat.encoder([{"role": "user", "content": content + "\ufdef"}], False, False)


def test_what_templates_are_written_to_find():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ undefined_thing }}{{ eos_token }}"
    )
    with chat_of(template) as chat:
        assert chat.render([{"role": "user", "content": "<é'>"}] * 2, False) == (
            '{"role": "user", "content": "<é\'>"}4True'
        )


@pytest.mark.parametrize(
    "template,complaint",
    [
        ("{{ raise_exception('roles must alternate') }}", "its chat template cannot be rendered: roles must alternate"),
        ("{% for", "cannot be rendered: .*line 1"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (
            "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
            "0.5 s of processor time",
        ),
        (
            "{% set r = range(99999) %}{% for i in r %}{% for j in r %}0123456789{% endfor %}{% endfor %}",
            "8388608 char",
        ),
        ("{{ 'a' * 10**12 }}", "MiB of memory|characters"),
        ("{{ 'a' * 10**7 }}", "8388608 characters"),
        ("{{ 9**(9**(9**9)) }}", "processor time|memory|too large"),
        ("{{ '%2000000000d' % 1 }}", "memory|characters"),
        ("{{ messages[7].content }}", "AttributeError|undefined|has no element"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion|memory|ended"),
        ("(" * 50_000, ""),
        ("{{" + "(" * 50_000, "cannot be rendered"),
    ],
)
def test_hostile_templates_are_one_line_in_a_few_seconds(template, complaint, monkeypatch):
    monkeypatch.setattr("kqprefill.text.chat.SECONDS", 3 if "0123456789" in template else 0.5)
    begin = time.monotonic()
    with chat_of(template) as chat:
        if complaint:
            with pytest.raises(kqprefill.InputError, match=complaint) as raised:
                chat.render(ASKED, True)
            assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
        else:
            assert chat.render(ASKED, True) == template
    assert time.monotonic() - begin < 60


def test_after_a_renderer_has_ended_there_is_another(monkeypatch):
    monkeypatch.setattr("kqprefill.text.chat.SECONDS", 0.5)
    long = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    with chat_of("{% if messages | length > 1 %}" + long + "{% endif %}ab") as chat:
        for _ in range(2):
            assert chat.render(ASKED, True) == "ab"
            with pytest.raises(kqprefill.InputError, match="processor time"):
                chat.render(ASKED * 2, True)


@pytest.mark.parametrize("messages", [[], {}, "Hi", [1], [{}], [{"role": 1}], [{"content": "a"}], None])
def test_messages_that_are_none(messages):
    with chat_of() as chat, pytest.raises(kqprefill.InputError, match="message"):
        chat.encoder(messages, True)


def test_a_file_without_a_template_says_so():
    with pytest.raises(kqprefill.ModelError, match="no chat template"):
        Chat(Tokenizer(VALUES, "test"), VALUES, "test", None)
    with pytest.raises(kqprefill.ModelError, match="chat_template is an array"):
        chat_of(np.arange(3))


def test_no_process_is_left(model_path):
    with kqprefill.load(model_path, backend="cpu") as model:
        model.tokenize_chat(ASKED)
        process = model._last_chat._process
        assert process.poll() is None
        model.tokenize_chat(ASKED, chat_template="another")
        assert process.poll() is not None
        process = model._last_chat._process
    assert process.poll() is not None


def test_run_chat(model_path, tmp_path):
    with kqprefill.load(model_path, backend="cpu") as model:
        expected = model.prefill(model.tokenize_chat([{"role": "user", "content": "Hello"}])).token
        (tmp_path / "template").write_text("\n{{ messages[0].content }}\n")
        other = model.prefill(model.tokenize("\nHello")).token
    (tmp_path / "text").write_text("Hello")
    run = ["run", model_path, "--backend", "cpu", "--chat"]
    for args, stdin in ((["-p", "Hello"], None), (["-f", tmp_path / "text"], None), ([], b"Hello")):
        assert kq(*run, *args, stdin=stdin).stdout.decode() == f"{expected}\n"
    done = kq(*run, "-p", "Hello", "--chat-template", tmp_path / "template")
    assert done.stdout.decode() == f"{other}\n", done.stderr


@pytest.mark.parametrize(
    "args,status,complaint",
    [
        (["--chat", "--tokens", "1"], 2, "--chat is for a text"),
        (["--chat-template", EXAMPLE, "-p", "a"], 2, "--chat-template says how --chat"),
        (["--chat", "--chat-template", "/no/such", "-p", "a"], 1, "--chat-template /no/such: No such file"),
        (["--chat", "-p", "a"], 1, "has no chat template"),
        (["--chat", "-p", ""], 2, "empty"),
    ],
)
def test_run_chat_that_cannot_be(args, status, complaint):
    done = kq("run", EXAMPLE, "--backend", "cpu", *args)
    assert done.returncode == status and complaint in done.stderr.decode() and done.stdout == b""
    assert b"Traceback" not in done.stderr


def test_messages_in_score(model_path):
    answer = {"role": "assistant", "content": "Paris"}
    records = [
        {"messages": ASKED, "completion": "Paris", "id": 1},
        {"messages": ASKED, "choices": ["Paris", "Rome"]},
        {"messages": [*ASKED, answer]},
        {"messages": []},
        {"messages": ASKED, "prompt": "a"},
        {"messages": ASKED, "completion": [1, 2]},
    ]
    done = kq("score", model_path, "--backend", "cpu", "--on-error", "skip", stdin=lines(records))
    found = read(done.stdout)
    assert done.returncode == 3 and [("error" in line) for line in found] == [False] * 3 + [True] * 3
    with kqprefill.load(model_path, backend="cpu") as model:
        ids = model.tokenize_chat(ASKED)
        whole = model.tokenize_chat([*ASKED, answer], add_generation_prompt=False)
        by_ids = list(model.score([{"tokens": ids, "completion": model.tokenize("Paris")}, whole]))
    assert found[0]["logprob"] == pytest.approx(by_ids[0].logprob, rel=1e-5) and found[0]["id"] == 1
    assert found[1]["choices"][0]["n_tokens"] == 5 and found[2]["n_tokens"] == len(whole) - 1
    assert found[2]["logprob"] == pytest.approx(by_ids[1].logprob, rel=1e-5)


def test_a_template_that_refuses_a_conversation_is_a_bad_record(model_path, tmp_path):
    (tmp_path / "template").write_text("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}ab")
    records = [{"messages": ASKED * n} for n in (1, 2, 1)]
    args = "score", model_path, "--backend", "cpu", "--chat-template", tmp_path / "template", "--on-error", "skip"
    first, second, third = read(kq(*args, stdin=lines(records)).stdout)
    assert "one only" in second["error"] and first["n_tokens"] == third["n_tokens"] == 1


def test_without_jinja2_one_line_names_the_extra(model_path, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('not here')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    args = [*ENTRY, "run", model_path, "--backend", "cpu", "--chat", "-p", "a"]
    done = subprocess.run(args, capture_output=True, env=env, text=True)
    assert done.returncode == 2 and "pip install 'kqprefill[chat]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_renderer_takes_nothing_from_the_current_folder(model_path, tmp_path):
    for name in ("jinja2", "json", "runpy", "resource", "signal", "datetime"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit('planted')")
    code = f"import sys; sys.path.pop(0); sys.path.insert(0, {str(Path(kqprefill.__file__).parents[1])!r})\n"
    code += f"sys.argv[1:] = ['run', {str(model_path)!r}, '--backend', 'cpu', '--chat', '-p', 'a']\n"
    code += "from kqprefill.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr


# --no-special, --decode --------------------------------------------------------------------------------------------


def test_texts_of_control_tokens_are_text_where_that_is_asked_for():
    tokenizer = Tokenizer(VALUES, "test")
    assert tokenizer.encode("a<|end|><tag>") == spelled("{BOS}a{END}{TAG}")
    assert tokenizer.encode("a<|end|><tag>", parse_special=False) == spelled("{BOS}a<|end|>{TAG}")
    assert tokenizer.encode("<s>", add_special=False, parse_special=False) == spelled("<s>")


@pytest.mark.parametrize("space", [True, False])
def test_decoding_is_the_inverse_of_encoding(space, rng):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "\u2581a", "b"]
    values = {
        "model": "llama",
        "tokens": pieces,
        "token_type": np.array([2, 3, 3, *[6] * 256, 1, 1, 1, 1], np.int32),
        "scores": np.zeros(len(pieces), np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_eos_token": True,
        "add_space_prefix": space,
    }
    sentencepieces = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    for metadata in (VALUES, sentencepieces):
        tokenizer = Tokenizer(metadata, "test")
        for special in (True, False):
            for _ in range(50):
                text = "".join(rng.choice(["a", "b", " ", "é", "</s>", "<|end|>", "\n"], 8))
                ids = tokenizer.encode(text, special)
                assert tokenizer.decode(ids, special) == text.encode(), (text, ids)
    with pytest.raises(kqprefill.InputError, match="token 999 is not in the vocabulary of 260 tokens"):
        Tokenizer(VALUES, "test").decode([999])


def test_decode_on_the_command_line(tmp_path):
    (tmp_path / "ids").write_text("72,195,169\n")
    for args, stdin in (
        (["72,195,169"], None),
        (["72", "195", "169"], None),
        ([], b"72 195 169"),
        (["-"], b"72,195,169"),
    ):
        assert kq("tokenize", EXAMPLE, "--decode", *args, stdin=stdin).stdout.decode() == "Hé\n"
    assert kq("tokenize", EXAMPLE, "--decode", f"@{tmp_path / 'ids'}").stdout.decode() == "Hé\n"
    assert kq("tokenize", EXAMPLE, "--decode", "-f", tmp_path / "ids").stdout.decode() == "Hé\n"
    assert kq("tokenize", EXAMPLE, "--decode", "195").stdout == b"\xc3\n"  # half a character stays what it is
    found = json.loads(kq("tokenize", EXAMPLE, "--decode", "--json", "72").stdout)
    assert found == [{"id": 72, "text": "H"}]


@pytest.mark.parametrize(
    "args,complaint",
    [
        (["--decode", "1_0"], "IDS: '1_0' is not a token id"),
        (["--decode", "99999"], "token 99999 is not in the vocabulary"),
        (["--decode", "1", "--no-special"], "--no-special says how a text is read"),
        (["two", "words"], "quote it"),
    ],
)
def test_decoding_that_cannot_be(args, complaint):
    done = kq("tokenize", EXAMPLE, *args)
    assert done.returncode == 2 and complaint in done.stderr.decode() and done.stdout == b""


def test_no_special_in_every_command(tmp_path):
    file = SyntheticFile.named("tiny:Q4_0")
    vocabulary = list(file.metadata["tokenizer.ggml.tokens"])
    vocabulary[7], types = "<|end|>", list(file.metadata["tokenizer.ggml.token_type"])
    types[7] = 3
    file.metadata |= {"tokenizer.ggml.tokens": vocabulary, "tokenizer.ggml.token_type": types}
    path, text = tmp_path / "model.gguf", tmp_path / "text"
    write_gguf(file, path)
    text.write_text("<|end|>" * 40)
    plain = {"tokenize": 280, "run": 280, "score": 279, "perplexity": 140}
    for option in ([], ["--no-special"]):
        many = plain if option else {name: count // 7 for name, count in plain.items()}
        many["score"] = 279 if option else 39
        assert len(kq("tokenize", path, "-f", text, *option).stdout.split(b",")) == many["tokenize"]
        cpu = ["--backend", "cpu"]
        done = kq("run", path, "-f", text, "--json", *cpu, *option)
        assert json.loads(done.stdout)["prompt_tokens"] == many["run"]
        done = kq("score", path, *cpu, *option, stdin=lines([{"prompt": text.read_text()}]))
        assert read(done.stdout)[0]["n_tokens"] == many["score"]
        done = kq("perplexity", path, "-f", text, "-c", "40", "--json", *cpu, *option)
        assert json.loads(done.stdout)["n_tokens"] == len(range(many["run"] // 40)) * 19
