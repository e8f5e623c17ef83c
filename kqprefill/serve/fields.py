"""The fields of a request's JSON object, each read once and checked; and what a client is told of a bad one."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import KqprefillError
from ..gguf.keys import described

_ABSENT = object()


class ApiError(KqprefillError):
    """What a client is told in place of a result, with an HTTP status. param: the field that it is about.

    retry_after: seconds, of a request that may be sent again then.
    """

    def __init__(self, status: int, message: object, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status == 401:
            kind = "authentication_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}


class Fields:
    """A request's JSON object. Every method raises ApiError (400), which names the field. names: of all fields."""

    def __init__(self, body: bytes) -> None:
        try:
            found = json.loads(body, parse_constant=_no_constant)
        except RecursionError:
            raise ApiError(400, "the body is no JSON: it is nested too deeply") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ApiError(400, f"the body must be a JSON object, not {described(found)}")
        self._left: dict[str, Any] = found
        self.names = frozenset(found)

    def take(self, name: str, default: Any = _ABSENT) -> Any:
        """A field's value, whatever it is; null and absent are the default."""
        value = self._left.pop(name, None)
        if value is None:
            if default is _ABSENT:
                raise ApiError(400, f'"{name}" is missing', name)
            return default
        return value

    def text(self, name: str, default: Any = _ABSENT) -> Any:
        """A text."""
        value = self.take(name, default)
        if value is not default and not isinstance(value, str):
            raise ApiError(400, f'"{name}" must be a text, not {described(value)}', name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ApiError(400, f'"{name}" must be true or false, not {described(value)}', name)
        return value

    def count(self, name: str, most: int, default: Any = _ABSENT, least: int = 0) -> Any:
        """An integer from least to most."""
        value = self.take(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise ApiError(400, f'"{name}" must be an integer, not {described(value)}', name)
        if value is not default and not least <= value <= most:
            raise ApiError(400, f'"{name}" is {described(value)}; {least} to {most} are possible', name)
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ApiError(400, f'"{name}" must be a number, not {described(value)}', name)
        return value

    def refuse(self, name: str, *neutral: Any, why: str = "this server does not have it") -> None:
        """A field that would change the result in a way that is not supported, unless its value is a neutral one."""
        value = self._left.pop(name, None)
        if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
            raise ApiError(400, f'"{name}": {why}; leave it out', name)

    def ignore(self, *names: str) -> None:
        """Fields that change no result."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Refuse what is left, which nobody has asked for."""
        for name in self._left:
            raise ApiError(400, f"{json.dumps(name[:80])} is no field of this request", name[:80])


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON's")
