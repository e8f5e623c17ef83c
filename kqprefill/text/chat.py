"""Conversations to token ids, by the chat template that a GGUF carries or that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from ..errors import InputError, ModelError
from ..gguf.keys import read_key
from .render import SECONDS
from .tokenizer import Tokenizer

# Characters of Unicode that are none and stand in no text: one that a conversation does not have marks its texts.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# The renderer finds jinja2 where this process would find it, and nothing in the current folder.
_START = (
    "import sys; sys.path[:] = sys.argv[2].split('\\n'); import runpy; runpy.run_path(sys.argv[1], None, '__main__')"
)


class Chat:
    """A chat template, rendered by a process of its own (`render.py`); a context manager, ended by `close`."""

    def __init__(self, tokenizer: Tokenizer, metadata: Mapping[str, Any], path: str, template: str | None) -> None:
        """tokenizer, metadata, path: a file's. template: the caller's, None for the file's own
        (`tokenizer.chat_template`; those for other uses, which have longer names, are not asked).

        Raises ModelError where the file has none.
        """
        self._tokenizer, self._whose = tokenizer, "the chat template"
        if template is None:
            self._whose = f"{path}: its chat template"
            template = read_key(metadata, "tokenizer.chat_template", lambda what: ModelError(f"{path}: {what}"))
        if template is None:
            raise ModelError(f"{path}: it has no chat template (tokenizer.chat_template); give --chat-template FILE")
        tokens = {f"{name}_token": tokenizer.named(name) for name in ("bos", "eos")}
        self._setup = json.dumps({"template": template, "tokens": tokens, "seconds": SECONDS}).encode()
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def encoder(self, messages: Any, generation: bool, parse_special: bool = True) -> Callable[[str], list[int]]:
        """encode(text): the ids of a conversation with a text after it.

        messages: [{"role": …, "content": …, …}]. generation: whether the template begins the answer, which the text
        then is. What the template writes is read with its special tokens, without a second BOS where it writes one and
        without the file's EOS. parse_special: whether such tokens' texts are tokens in the messages and in the text too
        (`Tokenizer.encode`). Raises InputError where messages are none, where the template refuses them or takes too
        much time or memory, or where jinja2 is missing.
        """
        _check(messages)
        if parse_special:
            rendered = self.render(messages, generation)
            return lambda text: self._tokenizer.encode_rendered(rendered + text)
        spelled = _spelled(messages)
        mark = next((mark for mark in _MARKS if mark not in spelled), None)
        if mark is None:
            raise InputError("the messages hold each of the characters U+FDD0 to U+FDEF, of which one is needed")
        hide = self._tokenizer.hider(mark)
        hidden = self.render(_mapped(messages, hide), generation)
        return lambda text: self._tokenizer.encode_rendered(hidden + hide(text), mark)

    def render(self, messages: Any, generation: bool) -> str:
        """A conversation as the template spells it. Raises InputError."""
        asked = _spelled({"messages": messages, "generation": generation}, ascii_only=True).encode()
        with self._one_at_a_time:
            try:
                answer = self._ask(asked)
            except BaseException:  # an interrupt: its answer would be taken for the next one's
                self.close()
                raise
        if "missing" in answer:
            raise InputError("a chat template needs jinja2: pip install 'kqprefill[chat]'")
        if "error" in answer:
            raise InputError(f"{self._whose} cannot be rendered: {answer['error']}")
        return str(answer["text"])

    def _ask(self, asked: bytes) -> dict[str, Any]:
        process, data = self._process, asked + b"\n"
        if process is None:
            process = self._process = _start()
            data = self._setup + b"\n" + data
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(data)
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        self._process = None
        ended = _end(process)
        if ended == -signal.SIGPROF:
            return {"error": f"it takes more than {SECONDS:g} s of processor time"}
        return {"error": f"its process has ended ({ended})"}

    def close(self) -> None:
        """End the renderer. Twice is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _end(process)

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start() -> subprocess.Popen[bytes]:
    """The renderer, which ends where its stdin does; an interrupt from the terminal is for this process alone."""
    renderer = str(Path(__file__).with_name("render.py"))
    return subprocess.Popen(
        [sys.executable, "-c", _START, renderer, "\n".join(map(os.path.abspath, sys.path))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> int:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()
    return process.wait()


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError('"messages" must be a list of at least one')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f'message {number} must be an object with a text "role", and "content"')


def _spelled(value: Any, ascii_only: bool = False) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii_only)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages are nothing that JSON can hold: {error}") from None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(held, change) for key, held in value.items()}
    return [_mapped(held, change) for held in value] if isinstance(value, (list, tuple)) else value
