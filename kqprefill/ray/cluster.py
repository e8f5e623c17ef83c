"""A Ray cluster: connecting to it, and how many replicas of a model its machines have room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
import logging
import math
import os
import socket
import sys
from typing import Any

import ray

from ..cli.interrupts import on_signals, raise_signal
from ..errors import InputError, KqprefillError

_PATIENCE = 10.0  # seconds for a cluster's head to answer


@dataclass(frozen=True)
class Share:
    """What each of `replicas` replicas takes, by Ray's resources; backend: on which it runs, "cpu" or "cuda"."""

    replicas: int
    backend: str
    num_cpus: int
    num_gpus: float


@contextmanager
def connected(address: str, verbose: bool = False) -> Iterator[None]:
    """Meanwhile this process is a driver of the cluster at HOST:PORT; of this machine's (auto), or one that is started
    where there is none; or of one that is started for it alone (local).

    verbose: what Ray prints goes to stderr; else it is dropped. (It prints on stdout what befalls its workers, also
    where it is asked not to.) Raises KqprefillError where there is no such cluster.
    """
    _refuse_unreachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(None if address == "auto" else address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise KqprefillError(f"--ray {address}: {' '.join(str(error).split())}") from None
    with open(os.devnull, "w") as nothing, redirect_stdout(sys.stderr if verbose else nothing):
        try:
            on_signals(raise_signal)  # Ray has put handlers of its own in their place
            yield
        finally:
            ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Raise KqprefillError where nobody listens at HOST:PORT, for which Ray waits without an end in sight."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise KqprefillError(f"--ray {address}: no Ray cluster can be reached there: {error}") from None


def share_of(nodes: Sequence[dict[str, Any]], backend: str, replicas: int | None, vram: str | None) -> Share:
    """How `replicas` replicas share the nodes (`ray.nodes()`); None for as many as there are GPUs, or nodes where there
    are none.

    backend: "auto" takes the GPUs where a node has one. More replicas than GPUs share them, each within --vram. On CPUs
    each takes as many as leave room for all. Raises InputError where there is no room.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(own.get("CPU", 0)) for own in resources]
    gpus = sum(int(own.get("GPU", 0)) for own in resources)
    if backend == "cuda" and not gpus:
        raise InputError("--backend cuda: the cluster has no GPU")
    if backend != "cpu" and gpus:
        count = replicas or gpus
        if count <= gpus:
            return Share(count, "cuda", 1, 1)
        if vram is None:
            raise InputError(f"--replicas {count}: the cluster has {gpus} GPUs; give --vram so that they share them")
        return Share(count, "cuda", 1, 1 / math.ceil(count / gpus))
    count = replicas or sum(1 for own in cpus if own)
    for each in range(max(cpus, default=0), 0, -1):
        if count and sum(own // each for own in cpus) >= count:
            return Share(count, "cpu", each, 0)
    raise InputError(f"--replicas {count}: the cluster has {sum(cpus)} CPUs, and each replica takes one")
