"""What the CUDA ops launch, on a machine without a GPU: kernels that exist, take that many arguments and fit a GPU."""

import ctypes
import itertools
import re
from types import SimpleNamespace

from cuda.bindings.driver import CUresult
import numpy as np
import pytest

from kqprefill.backends.base import Batch, Segment, Targets
from kqprefill.backends.cuda.compiler import text_of
from kqprefill.backends.cuda.graphs import Graphs
from kqprefill.backends.cuda.memory import Workspace
from kqprefill.backends.cuda.ops import CudaOps
from kqprefill.backends.cuda.rehearsal import stand_in
from kqprefill.synthetic import SyntheticFile
from kqprefill.models import read_model

SHARED_MEMORY = {(8, 0): 163 << 10, (9, 0): 227 << 10, (12, 0): 99 << 10}  # of a block, by capability
OK = CUresult.CUDA_SUCCESS


def facts(capability):
    """What a stand-in for such a GPU must know."""
    return SimpleNamespace(capability=capability, multiprocessors=132, shared_memory=SHARED_MEMORY[capability])


class Recorder:
    """In place of Kernels: checks each launch against the source."""

    def __init__(self, shared_memory):
        self.shared_memory, self.prepared, self.launched = shared_memory, set(), []

    def fence(self):
        pass

    def prepare(self, programs, progress):
        self.prepared.update(programs)

    def launch(self, program, name, grid, threads, *args, shared_bytes=0):
        parameters = kernel_parameters(program.source)[name]
        assert len(args) == len(parameters), f"{program.source}: {name}"
        for value, parameter in zip(args, parameters):
            wanted = (
                ctypes.c_float
                if re.match(r"float \w+$", parameter)
                else ctypes.c_int32
                if re.match(r"int \w+$", parameter)
                else int
            )
            assert type(value) is wanted, f"{name}: {parameter} got {value!r}"
        assert all(g > 0 for g in np.atleast_1d(grid)) and 0 < threads <= 1024
        assert shared_bytes <= self.shared_memory
        self.launched.append((program, name))


def kernel_parameters(source):
    text = re.sub(r"//[^\n]*", "", text_of(source))
    found = re.findall(r'extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(([^)]*)\)', text)
    return {name: [" ".join(p.split()) for p in parameters.split(",")] for name, parameters in found}


@pytest.mark.parametrize("capability,portable", [((8, 0), False), ((12, 0), False), ((9, 0), False), ((9, 0), True)])
@pytest.mark.parametrize(
    "model",
    ["tiny:Q4_K_M", "qwen3-8b:Q4_K_M", "qwen3-32b:Q8_K", "llama3-70b:F32", "llama3-8b:Q3_K", "qwen3-30b-a3b:Q4_K_M"],
)
def test_launches(model, capability, portable):
    family = read_model(SyntheticFile.named(model))
    family.blocks = family.blocks[:2]
    kernels = Recorder(SHARED_MEMORY[capability])
    hopper = capability == (9, 0) and not portable
    for n in (1, 16, 17, 64, 100, 129, 2048, 4000, 20000):
        backend = stand_in(facts(capability), hopper, kernels, host_embedding=n in (129, 20000))
        tokens = np.zeros(n, np.int32)
        half = (Segment(0, n - n // 2), Segment(n - n // 2, n // 2, n - n // 2, 0)) if n > 1 else ()
        for logits in (None, "last", "all", "ranks"):
            kernels.launched.clear(), kernels.prepared.clear()
            targets = Targets(np.arange(n, dtype=np.int32), tokens, 2) if logits == "ranks" else None
            ops = CudaOps(
                backend, family.config, Batch(tokens, segments=half if targets else (), targets=targets), None
            )
            ops.prepare(family, logits, lambda *_: None)
            x = family.embed(ops, tokens)
            for index, weights in enumerate(family.blocks):
                x = family.layer(ops, weights, x, index)
            if logits == "ranks":
                family.head(ops, x, logits)
                assert [name for _, name in kernels.launched].count("copy_rows") == (
                    len(family.blocks) if ops.n_copies else 0
                )
            else:
                h = ops.rms_norm(x, family.output_norm, rows=ops._head_rows(family.config.vocab_size, logits))
                ops._multiply(h, [ops.weights.matrix(family.output)], 1 << 50, h.rows)
            # Every GEMM was compiled ahead (loading compiled the rest).
            launched = {p for p, _ in kernels.launched if p.source.startswith("gemm")}
            assert launched <= kernels.prepared
            assert any(p.source == ("gemm_sm90.cu" if hopper else "gemm_sm80.cu") for p in launched)


def test_graphs_wait_for_steady_buffers():
    """First launches, then captures; and starts over when a work buffer has moved."""
    captured, addresses = itertools.count(), itertools.count(1)
    gpu = SimpleNamespace(
        stream=SimpleNamespace(handle=0, sync=lambda: None),
        zero=lambda *_: None,
        allocate=lambda nbytes, _: SimpleNamespace(
            handle=next(addresses) << 40, size=max(nbytes, 256), close=lambda stream: None
        ),
    )
    gpu.driver = SimpleNamespace(
        CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1),
        cuStreamBeginCapture=lambda *_: (OK,),
        cuStreamEndCapture=lambda *_: (OK, 7),
        cuGraphDestroy=lambda *_: (OK,),
        cuGraphInstantiate=lambda *_: (OK, next(captured)),
        cuGraphExecDestroy=lambda *_: (OK,),
        cuGraphLaunch=lambda *_: (OK,),
    )
    workspace = Workspace(gpu)
    graphs, calls = Graphs(gpu, workspace), []

    def run(n):
        before = len(calls)
        graphs.run(SimpleNamespace(n=n), lambda ops: calls.append(n))
        return len(calls) > before  # whether forward ran, rather than a graph of it

    assert [run(5), run(5), run(5), run(5)] == [True, True, False, False]
    assert [run(6), run(5)] == [True, False]
    workspace.get("anything", 100)  # more memory moves nothing, but growing does
    assert run(5) is False
    workspace.get("anything", 1000)
    assert [run(5), run(5), run(5)] == [True, True, False]
    assert [run(3000) for _ in range(4)] == [True] * 4
