"""The process that renders chat templates, which come from files that nobody has vouched for.

It is run by its path, with nothing of the package, and given what it needs on stdin: first a line of JSON with the
template, the texts of special tokens and the seconds that a conversation may take, then a line for each conversation,
each answered by a line on stdout. Jinja's sandbox keeps a template from Python's objects; the limits below keep it from
time and memory, whatever it does: the system holds the process to them, so that no loop and no `"a" * 10**12` need be
foreseen.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import resource
import signal
import sys
from typing import Any

SECONDS = 5.0  # of processor time for a conversation
MEMORY = 1 << 29  # bytes of addresses
CHARACTERS = 1 << 23  # of one rendered conversation
_LONGEST = 300  # characters of a message


def main() -> None:
    """Answer until stdin ends."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in whatever it is
    setup = json.loads(sys.stdin.buffer.readline())
    render: Callable[[Any, bool], str] | None = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            asked = json.loads(line)
            if render is None:
                render = renderer(setup["template"], setup["tokens"])
            answer = {"text": render(asked["messages"], asked["generation"])}
        except ImportError:
            answer = {"missing": "jinja2"}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
        except Exception as error:  # a template may raise whatever it likes
            answer = {"error": _described(error)}
        data = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(data + "\n")
        sys.stdout.flush()


def renderer(template: str, tokens: dict[str, str]) -> Callable[[Any, bool], str]:
    """render(messages, generation) by a template in Jinja, with what models' templates are written to find there (the
    names are those of Hugging Face's `apply_chat_template`).

    tokens: texts of special tokens by the names that templates know them by, "bos_token" and "eos_token". generation:
    whether the beginning of the answer is to follow. Raises ImportError; rendering raises what it may.
    """
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what an assistant wrote; here it is only what is in it."""

        tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            """The statements up to the end's tag, with names of their own."""
            at = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=at)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """As it is: Jinja's own filter escapes what HTML would read."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    compiled = environment.from_string(template)

    def render(messages: Any, generation: bool) -> str:
        given = {**tokens, "messages": messages, "add_generation_prompt": generation, "tools": None, "documents": None}
        pieces, count = [], 0
        for piece in compiled.generate(given):
            count += len(piece)
            if count > CHARACTERS:
                raise TemplateError(f"it writes more than {CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render


def _described(error: Exception) -> str:
    words = str(error)[:_LONGEST] or type(error).__name__
    kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
    at = getattr(error, "lineno", None)
    return f"{kind}{words}" + (f" (line {at})" if at else "")


if __name__ == "__main__":
    main()
