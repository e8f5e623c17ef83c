"""Which GPUs a model runs on: a number, several, or all."""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import TypeAlias

from ..errors import InputError

# "0", "0,1", "all", or numbers.
Devices: TypeAlias = str | int | Sequence[int]

ALL = "all"
SAME_DEVICE = "KQPREFILL_SAME_DEVICE"  # =1: one device may be named several times, to try a pipeline where there is one


def device_numbers(devices: Devices) -> tuple[int, ...] | None:
    """The numbers, in the order in which layers are split over them; None for "all", which the driver knows.

    Raises InputError for what names no device, or one twice.
    """
    if devices == ALL:
        return None
    named = devices.split(",") if isinstance(devices, str) else [devices] if isinstance(devices, int) else list(devices)
    numbers = []
    for one in named:
        text = str(one).strip()
        if isinstance(one, bool) or not (text.isascii() and text.isdecimal()):
            raise InputError(f"device {text!r}: give numbers parted by commas, such as 0 or 0,1, or {ALL}")
        numbers.append(int(text))
    if not numbers:
        raise InputError("no device is named; give a number, such as 0")
    twice = [number for number in numbers if numbers.count(number) > 1]
    if twice and os.environ.get(SAME_DEVICE) != "1":
        raise InputError(f"device {twice[0]} is named twice; each runs layers of its own")
    return tuple(numbers)
