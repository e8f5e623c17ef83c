"""Scores records over a Ray cluster of two nodes on this machine while workers, a node and the driver are killed.

    python tests/bench/ray_faults.py [--rounds 10] [--records 10000] [--seed N]

Each round begins an output folder anew and does it three times harm, each when a random number of blocks is done: a
worker is killed (SIGKILL), a node is removed (and comes back after the round), the driver is killed, after which
another goes on with --resume. After the last the driver that is running ends by itself. The folder must then equal,
record for record, that of an undisturbed run in one process. Needs `pip install '.[ray]'`; ten rounds take some minutes
of two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3.gguf"
OWN = "_kqprefill"
HARM = "worker", "node", "driver"
BLOCK = "12K"
STORE = 80 << 20  # bytes of a node's object store: little more than Ray wants
PATIENCE = 240.0  # seconds for anything


def write_inputs(folder: Path, records: int, choose: random.Random) -> None:
    """Files of records: lines, one in 200 of them bad, and a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [
        {"tokens": [choose.randrange(256) for _ in range(choose.randrange(2, 60))], "id": i} for i in range(records)
    ]
    for record in made[::7]:
        record["choices"] = [[1, 2], [choose.randrange(256)]]
    lines, rows = made[: records * 3 // 4], made[records * 3 // 4 :]
    texts = [json.dumps(record) if i % 200 else "{" for i, record in enumerate(lines)]
    for name, part in (("a", texts[::2]), ("b", texts[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(text + "\n" for text in part))
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=max(1, len(rows) // 5))


def records_of(folder: Path) -> list[tuple[str, str]]:
    """(the input's place, a line or row as text) of all results, in order."""
    import pyarrow.parquet as pq

    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        own: list[Any] = (
            pq.read_table(path).to_pylist()
            if path.suffix == ".parquet"
            else [json.loads(line) for line in path.read_bytes().splitlines()]
        )
        found += [(path.name.partition("-")[0], repr(one)) for one in own]
    return found


def blocks_in(folder: Path) -> int:
    """How many blocks are done."""
    return sum(path.is_file() for path in folder.iterdir()) if folder.is_dir() else 0


def workers() -> list[int]:
    """The processes of replicas of clusters that this process has started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def above(pid: int) -> Iterator[int]:
        while pid := parents.get(pid, 0):
            yield pid

    return [int(pid) for pid, _, args in rows if args.startswith("ray::Replica") and os.getpid() in above(int(pid))]


@dataclass
class Round:
    """One output folder through harm. said: what was done, when; wrong: what went wrong."""

    cluster: Any
    node: Any
    folder: Path
    inputs: Path
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    drivers: int = 0

    def start(self) -> subprocess.Popen[bytes]:
        """A driver, which goes on where there is something."""
        self.drivers += 1
        command = [sys.executable, "-m", "kqprefill", "score", str(MODEL), str(self.inputs), "-o", f"{self.folder}/"]
        more = ["--backend", "cpu", "--block", BLOCK, "--on-error", "skip", "--resume", "--replicas", "2"]
        return subprocess.Popen([*command, *more, "--ray", self.cluster.address], stderr=subprocess.PIPE)

    def harm(self, kind: str, driver: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Do it; the driver that is running afterwards."""
        if kind == "worker":
            pids = workers()
            if not pids:
                self.said[-1] += " (none was there)"
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
        elif kind == "node":
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None
        else:
            driver.kill()
            driver.communicate()
            return self.start()
        return driver

    def run(self, whole: int, choose: random.Random) -> None:
        """Begin, do harm, and wait for the end."""
        driver = self.start()
        kinds = choose.sample(HARM, len(HARM))
        for kind, at in zip(kinds, sorted(choose.sample(range(1, max(4, whole - 1)), len(HARM)))):
            self.wait(driver, at)
            time.sleep(choose.random() / 4)
            if driver.poll() is not None:
                break
            self.said.append(f"{kind} at {blocks_in(self.folder)}")
            driver = self.harm(kind, driver)
        try:
            said = driver.communicate(timeout=PATIENCE)[1].decode()
        except subprocess.TimeoutExpired:
            driver.kill()
            said = driver.communicate()[1].decode()
            self.wrong.append("the driver did not end")
        if driver.returncode != 3:
            self.wrong.append(f"exit status {driver.returncode}: {said.strip()}")

    def wait(self, driver: subprocess.Popen[bytes], blocks: int) -> None:
        """Until so many blocks are done, or the driver has ended."""
        end = time.monotonic() + PATIENCE
        while driver.poll() is None and blocks_in(self.folder) < blocks and time.monotonic() < end:
            time.sleep(0.02)


def compare(folder: Path, whole: Path) -> list[str]:
    """How a folder differs from that of an undisturbed run."""
    wrong, expected, found = [], records_of(whole), records_of(folder)
    if found != expected:
        twice = len(found) - len(set(found)) - (len(expected) - len(set(expected)))
        wrong.append(f"{len(set(expected) - set(found))} lost, {twice} twice, {len(set(found) - set(expected))} other")
    said, own = (json.loads((where / OWN / "manifest.json").read_bytes()) for where in (whole, folder))
    for key in ("blocks", "records", "bad", "n_tokens", "done"):
        if said[key] != own[key]:
            wrong.append(f"the manifest says {key} {own[key]}, not {said[key]}")
    if left := list(folder.rglob("*.tmp")):
        wrong.append(f"{len(left)} temporary files are left")
    return wrong


def main() -> int:
    """Do what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    from ray.cluster_utils import Cluster

    print(f"seed {given.seed}; {given.records} records, {given.rounds} rounds", flush=True)
    choose, bad = random.Random(given.seed), 0
    sized = {"num_cpus": 2, "object_store_memory": STORE}
    with tempfile.TemporaryDirectory() as place:
        inputs, whole = Path(place, "in"), Path(place, "whole")
        inputs.mkdir()
        write_inputs(inputs, given.records, choose)
        command = [sys.executable, "-m", "kqprefill", "score", str(MODEL), str(inputs), "-o", f"{whole}/"]
        begin = time.monotonic()
        done = subprocess.run([*command, "--backend", "cpu", "--block", BLOCK, "--on-error", "skip"])
        print(f"undisturbed, in one process: {blocks_in(whole)} blocks, {time.monotonic() - begin:.0f} s")
        assert done.returncode == 3, "the undisturbed run has failed"
        cluster = Cluster(initialize_head=True, head_node_args={**sized, "include_dashboard": False})
        try:
            node = cluster.add_node(**sized)
            print("| round | harm, when so many blocks were done | drivers | seconds | records | |\n|" + " --- |" * 6)
            for number in range(given.rounds):
                node = node or cluster.add_node(**sized)
                own = Round(cluster, node, Path(place, f"out{number}"), inputs)
                begin = time.monotonic()
                own.run(blocks_in(whole), choose)
                node = own.node
                wrong = own.wrong + compare(own.folder, whole)
                took, count = time.monotonic() - begin, len(records_of(own.folder))
                harm = ", ".join(own.said)
                verdict = "; ".join(wrong) or "equal"
                print(f"| {number} | {harm} | {own.drivers} | {took:.0f} | {count} | {verdict} |", flush=True)
                bad += bool(wrong)
        finally:
            cluster.shutdown()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
