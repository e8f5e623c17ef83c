"""Run commands on many files with faults: python tests/bench/fuzz.py [FILES [SEED [BEGIN]]].

100,000 files take half an hour to an hour of one core. Prints each fault with the seed and the number of its file,
which give the same file again; exit status 1 where there was one.
"""

import os
from pathlib import Path
import secrets
import sys
import tempfile
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from fuzzing import fuzz, warm_up  # type: ignore[import-not-found]  # noqa: E402

STRIDE = 1000


def main(count: str = "100000", seed: str | None = None, begin: str = "0") -> int:
    seed = seed or str(secrets.randbits(32))
    print(f"seed {seed}, {count} files from {begin}", flush=True)
    warm_up()
    found, start, first = 0, time.perf_counter(), int(begin)
    folder = tempfile.mkdtemp(prefix="kqprefill-fuzz-")
    for at in range(first, first + int(count), STRIDE):
        found += fuzz(seed, min(STRIDE, first + int(count) - at), folder, lambda line: print(line, flush=True), at)
        done = min(at + STRIDE, first + int(count)) - first
        print(f"{done} files, {found} with faults, {done / (time.perf_counter() - start):.0f} files/s", flush=True)
    if found:
        print(f"the files are in {folder}")
    else:
        os.rmdir(folder)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
