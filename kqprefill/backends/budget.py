"""Amounts of device memory as people say them: `8G`, `512M`, `75%`."""

from __future__ import annotations

from dataclasses import dataclass
import re

from ..errors import InputError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def gib(nbytes: float) -> str:
    """Bytes for people, in GiB."""
    return f"{nbytes / 2**30:.2f} GiB"


def gib_at_least(nbytes: int) -> str:
    """Bytes for people, in GiB, rounded up: enough where it is given as a Budget as it is printed."""
    return f"{-(-nbytes * 100 // 2**30) / 100:.2f} GiB"


@dataclass(frozen=True)
class Budget:
    """How much device memory may be taken: a number of bytes, or a share of the device's memory."""

    amount: float
    is_share: bool = False

    @classmethod
    def parse(cls, value: Budget | str | int) -> Budget:
        """From bytes (an integer) or text: digits and K, M, G or T (powers of 1024; `GB` and `GiB` are the same), or
        `N%`.

        Raises InputError.
        """
        if isinstance(value, cls):
            return value
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(%|[KMGT]?)(?:I?B)?", str(value).strip().upper())
        if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
            raise InputError(f"a memory budget of {value!r}: give a size such as 8G or 512M, or a share such as 75%")
        if match[2] == "%":
            return cls(float(match[1]) / 100, True)
        return cls(float(match[1]) * _UNITS[match[2]])

    def of(self, total: int) -> int:
        """Bytes, on a device that has `total`."""
        return int(self.amount * total if self.is_share else self.amount)
