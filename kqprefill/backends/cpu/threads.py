"""Work on all cores: by threads of our own, while BLAS has one thread for each call.

BLAS's own threads wait for one another by spinning, for milliseconds after each product: for short prompts, and where
cores are shared, that takes more of the processor than the products do. And what they sum depends on how many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import ctypes
from functools import cache
from importlib import import_module
import os
from threading import Lock

import numpy as np

# What OpenBLAS calls these functions, as NumPy's wheels and others build it; %s: "get" or "set".
_NAMES = ("scipy_openblas_%s_num_threads64_", "openblas_%s_num_threads64_", "openblas_%s_num_threads")


class _Blas:
    """NumPy's OpenBLAS, told how many threads a call may use. threads: how many it had (OPENBLAS_NUM_THREADS, or the
    cores), 1 where NumPy has another BLAS: that one is left alone, and its threads are the only ones."""

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._set: Callable[[int], object] | None = None
        self.threads = 1
        core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
        try:  # a library's handle also finds the functions of the libraries that it was linked to
            library = ctypes.CDLL(import_module(f"{core}._multiarray_umath").__file__)
        except (ImportError, OSError):
            return
        for name in _NAMES:
            if hasattr(library, name % "set") and hasattr(library, name % "get"):
                self._set = getattr(library, name % "set")
                self.threads = max(1, int(getattr(library, name % "get")()))
                return

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Meanwhile each call uses one thread, in the whole process; batches of several models may overlap."""
        if self._set is None or self.threads == 1:
            yield
            return
        with self._lock:
            self._users += 1
            self._set(1)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._set(self.threads)


@cache
def blas() -> _Blas:
    """NumPy's BLAS."""
    return _Blas()


@cache
def _pool() -> ThreadPoolExecutor:
    # What overflows is found in the logits; NumPy's settings for warnings are each thread's own.
    return ThreadPoolExecutor(blas().threads, "kqprefill", initializer=lambda: np.seterr(all="ignore"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def in_parallel(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that do not depend on one another, on as many cores as BLAS would have used."""
    if len(tasks) == 1 or blas().threads == 1:
        for task in tasks:
            task()
    else:
        list(_pool().map(lambda task: task(), tasks))
