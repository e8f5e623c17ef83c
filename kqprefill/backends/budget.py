"""Amounts of device memory as people say them: `8G`, `512M`, `75%`; and how much main memory there is."""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path
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


def host_memory(
    cgroups: str | os.PathLike[str] = "/sys/fs/cgroup", membership: str | os.PathLike[str] = "/proc/self/cgroup"
) -> int:
    """Bytes of main memory that this process may use: the machine's, or what its control groups (v2) allow."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        group = Path(cgroups, Path(membership).read_text(encoding="utf-8").rpartition("0::/")[2].strip())
        files = [folder / "memory.max" for folder in (group, *group.parents)]
        texts = [file.read_text().strip() for file in files if file.exists()]
        limits += [int(text) for text in texts if text.isdigit()]  # else "max"
    except OSError:  # none
        pass
    return min(limits)


def free_host_memory() -> int:
    """Bytes of main memory that this process may use and that no process uses now (Linux's MemAvailable)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return host_memory()
    return min(free, host_memory())
