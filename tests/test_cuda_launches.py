"""What the CUDA backend launches, held without a GPU against the kernels' sources and against what is meant."""

from dataclasses import replace
import itertools
from types import SimpleNamespace

from cuda.bindings.driver import CUresult
import numpy as np
import pytest

from conftest import CASES, ROOT
from kqprefill.backends.cuda.attention_kernels import PortableAttention
from kqprefill.backends.cuda.constants import ACTIVATIONS, SHARED_DEFINES, THREADS
from kqprefill.backends.cuda.device.arrays import FLOAT32, INT32, DeviceArray
from kqprefill.backends.cuda.device.compiler import Program, text_of
from kqprefill.backends.cuda.device.graphs import Graphs
from kqprefill.backends.cuda.device.signatures import signatures_of
from kqprefill.backends.cuda.device.workspace import Workspace
from kqprefill.backends.cuda.gemm import hopper
from kqprefill.backends.cuda.kernel_set import kernel_set_of
from kqprefill.backends.cuda.ops.attention_layout import attention_layout
from kqprefill.backends.cuda.ops.chunk_layout import chunk_layout, parts_of
from kqprefill.backends.cuda.rehearsal import planned_batch, rehearse
from kqprefill.core import KEYS_PER_TOKEN, LARGEST_KEY_BLOCK, Batch, KeysValues, Latent, Segment, Targets
from kqprefill.engine.packing import packs
from kqprefill.engine.scoring import Item, packed
from kqprefill.errors import ModelError
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model
from kqprefill.synthetic import SyntheticFile
import launches
from launches import Facts, launches_of, shared_prompt

OK = CUresult.CUDA_SUCCESS
MODELS = [
    "tiny:Q4_K_M",
    "qwen3-8b:Q4_K_M",
    "qwen3-32b:Q8_K",
    "llama3-70b:F32",
    "llama3-8b:Q3_K",
    "qwen3-30b-a3b:Q4_K_M",
    "qwen3.6-27b:Q4_K_M",
    "qwen3.6-35b-a3b:Q4_K_M",
    "glm-4.5-air:Q4_K_M",
    "gemma4-31b:Q4_K_M",
    "gemma4-26b-a4b:Q4_K_M",
    "gemma4-e4b:Q4_K_M",
    "deepseek-v2-lite:Q4_K_M",
    "deepseek-v3:Q4_K_M",
]


@pytest.mark.parametrize("kernels", launches.KERNELS)
@pytest.mark.parametrize("case", launches.CASES)
def test_what_a_batch_launches(case, kernels):
    """Every kernel, block, grid and argument. A change that is meant is written down by `python tests/launches.py`."""
    expected = launches.path_of(case, kernels).read_text(encoding="utf-8")
    assert launches.text_of_case(case, kernels).splitlines() == expected.splitlines()
    assert case.startswith("int8") == ("gemm_int8" in expected)


@pytest.mark.parametrize("kernels", launches.KERNELS)
@pytest.mark.parametrize("path", CASES.values(), ids=CASES)
def test_every_familys_launches_in_int8(path, kernels):
    """Each of them is given what it takes: a norm whose halves nobody wrote is given to nobody who reads them."""
    capability, chosen = launches.KERNELS[kernels]
    family = read_model(GGUFFile(str(path)))
    kernel_set = kernel_set_of(capability, chosen)
    launches.launches_of(family, Facts(capability), kernel_set, Batch(np.zeros(70, np.int32)), None, False, "int8")


@pytest.mark.parametrize(
    "capability,kernels", [((8, 0), "auto"), ((12, 0), "auto"), ((9, 0), "auto"), ((9, 0), "portable")]
)
@pytest.mark.parametrize("model", MODELS)
def test_every_launch_fits_its_kernel(model, capability, kernels):
    """Names and types of arguments, grids, blocks and shared memory, of models' own sizes and many lengths."""
    family = read_model(SyntheticFile.named(model))
    family.blocks = family.blocks[:4]
    attentive = [i for i, state in enumerate(family.layer_states[:4]) if isinstance(state, (KeysValues, Latent))]
    facts, kernel_set = Facts(capability), kernel_set_of(capability, kernels)
    gemm = "gemm_sm90.cu" if kernel_set.name == "Hopper" else "gemm_sm80.cu"
    int8 = gemm.replace("gemm_", "gemm_int8_")
    for n in (1, 16, 17, 64, 100, 129, 2048, 4000, 20000):
        for logits in (None, "last", "all", "ranks"):
            batch = shared_prompt(n) if logits == "ranks" and n > 3 else Batch(np.zeros(n, np.int32))
            if logits == "ranks" and batch.targets is None:
                continue
            host_embedding = n in (129, 20000)
            launched, _ = launches_of(family, facts, kernel_set, batch, logits, host_embedding)
            programs = {program for program, *_ in launched}
            assert gemm in {program.source for program in programs}
            assert programs <= set(rehearse(family, facts, kernel_set, batch, logits, host_embedding).programs)
            launched, _ = launches_of(family, facts, kernel_set, batch, logits, host_embedding, "int8")
            programs = {program for program, *_ in launched}
            assert (int8 in {program.source for program in programs}) == (not model.endswith(":F32"))
            assert programs <= set(
                rehearse(family, facts, kernel_set, batch, logits, host_embedding, precision="int8").programs
            )
            copies = [kernel for _, kernel, *_ in launched].count("copy_rows")
            blocks = [kernel_set.attention(*family.head_dims(index)).block_kv for index in attentive]
            assert copies == sum(logits == "ranks" and batch.segments[0].length % block > 0 for block in blocks)


def test_arguments_go_by_name():
    signature = signatures_of("norm.cu")["rms_norm_in_place"]
    array = DeviceArray(4096, FLOAT32, (3, 8))
    right = {"x": array, "weight": array, "columns": 8, "stride": 8, "epsilon": 1e-6}
    signature.check(right)
    assert signature.values(dict(reversed(right.items()))) == [4096, 4096, 8, 8, 1e-6]
    wrong = [
        {name: value for name, value in right.items() if name != "stride"},
        {**right, "strides": 8},
        {**{name: value for name, value in right.items() if name != "stride"}, "strides": 8},
        {**right, "x": replace(array, dtype=INT32)},
        {**right, "columns": array},
        {**right, "x": 8},
        {**right, "columns": 8.0},
    ]
    for arguments in wrong:
        with pytest.raises((TypeError, Exception), match=r"rms_norm_in_place|required argument"):
            signature.check(arguments)


def test_shared_numbers_are_used_by_the_kernels():
    """Each define that the host passes is one that some kernel reads; each kernel has its threads from one of them."""
    one_size = (
        "norm rope scales head experts gates activations per_layer altup latent squares weights delta_inputs "
        "kda mamba_inputs convolution int8 int8_weights int8_rows".split()
    )  # kernels whose blocks are these
    sources = [
        *one_size,
        *"delta_prepare delta_scan mamba_scan gemm_sm80 gemm_sm90 gemm_int8_sm80 gemm_int8_sm90".split(),
        *"gemm_int8_short_sm90 attention_sm80 attention_sm90".split(),
    ]
    text = "\n".join(text_of(f"{source}.cu") for source in sources)
    assert [name for name in SHARED_DEFINES if name not in text] == []
    kernels = {kernel for source in one_size for kernel in signatures_of(f"{source}.cu")}
    assert kernels == set(THREADS)
    assert len(set(ACTIVATIONS.values())) == len(ACTIVATIONS)


def test_programs_that_differ_are_not_taken_for_one_another():
    a, b = Program("norm.cu"), Program("norm.cu", (("X", "1"),))
    assert a == Program("norm.cu") and hash(a) == hash(Program("norm.cu")) and a != b and len({a, b}) == 2


def test_the_cheapest_configuration_is_taken():
    """Of Hopper's GEMM: none costs less, and long batches get larger tiles than short ones."""
    for m, row_tiles, gated in itertools.product((1, 17, 100, 512, 8192), (8, 128, 400), (False, True)):
        best = hopper.best_config(m, row_tiles, gated, 132)
        costs = {config: config.cost(m, row_tiles, 132) for config in hopper.CONFIGS if config.gated == gated}
        assert best in costs and costs[best] == min(costs.values())
    assert hopper.best_config(1, 128, False, 132).tokens < hopper.best_config(8192, 128, False, 132).tokens == 256


def test_blocks_of_keys_are_those_that_packing_counts_on():
    with pytest.raises(ValueError, match="count on 128"):
        PortableAttention(64, 64, 2 * LARGEST_KEY_BLOCK, 8, 1)


def test_packed_batches_keep_to_the_keys_that_are_planned_for(rng):
    """Whatever is packed: as many rows of keys as the rehearsal makes room for, unless one piece alone has more."""
    config = kernel_set_of((9, 0)).attention(64, 64)

    def ids(most):
        return [0] * int(rng.integers(1, most))

    items = [Item(ids(300), [ids(4) for _ in range(rng.integers(1, 400))], True) for _ in range(20)]
    for batch_tokens in (500, 2000):
        for group in packs(iter(items), batch_tokens):
            batch, _ = packed([piece for piece, _ in group], 0)
            rows = attention_layout(batch.segments, config).rows
            alone = len(group) == 1 and len(group[0][0].continuations) == 1
            assert alone or (rows <= KEYS_PER_TOKEN * batch_tokens and len(batch.tokens) <= batch_tokens)


def test_chunks_find_every_position_of_their_sequence(rng):
    """Of the chunk and of the convolution's taps before it, whatever follows what in a batch."""
    first, segments = 0, []
    for _ in range(40):
        prompt = Segment(first, int(rng.integers(1, 300)))
        first, place = first + prompt.length, len(segments)
        segments.append(prompt)
        for _ in range(rng.integers(0, 3)):
            segments.append(Segment(first, int(rng.integers(1, 300)), prompt.length, place))
            first += segments[-1].length
    row_of = {}  # (segment, position in its sequence) -> row
    for number, segment in enumerate(segments):
        row_of |= {(number, segment.position + i): segment.first + i for i in range(segment.length)}
        if segment.after is not None:
            row_of |= {(number, i): row_of[segment.after, i] for i in range(segment.position)}
    layout = chunk_layout(segments)
    sequences = {first: count for level in layout.sequences for first, count, *_ in level}
    number, end = -1, 0
    for index, (row, before_row, begin, count, behind) in enumerate(layout.chunks.tolist()):
        if index == end:
            number, end = number + 1, index + sequences[index]
        for position in range(max(-3, -behind), count):
            found = (row if position >= begin else before_row) + position
            assert found == row_of[number, behind + position]
    assert number == len(segments) - 1


@pytest.mark.parametrize("most", [3, 16, 128])
def test_parts_of_a_batch_are_batches_of_their_own(rng, most):
    """Of so many chunks at most, unless what comes after a segment makes them more; a long sequence is cut alone."""
    first, segments = 0, []
    for _ in range(60):
        length = int(rng.choice([1, 30, 64, 65, 200, 2000]))
        place = len(segments)
        segments.append(Segment(first, length))
        first += length
        for _ in range(rng.integers(0, 3) * (length < 300)):
            segments.append(Segment(first, int(rng.integers(1, 100)), length, place))
            first += segments[-1].length
    row = 0
    whole = iter(segments)
    for part in parts_of(segments, most):
        assert part.first == row and part.segments[0].first == 0 and part.segments[0].after is None
        for number, segment in enumerate(part.segments):
            assert part.first + segment.first == row
            assert segment.after is None or segment.after < number
            row += segment.length
            if not (part.keeps and segment.position):
                original = next(whole)
            assert segment.after is not None or part.keeps or segment.position == 0
            if part.keeps:  # perhaps a part of it
                assert row <= original.first + original.length and segment.first + part.first - original.first == (
                    segment.position
                )
            else:
                assert (segment.length, segment.position) == (original.length, original.position)
                if segment.after is not None:
                    followed = part.segments[segment.after]
                    assert followed.first + part.first == segments[original.after].first
        assert part.last == row
        chunks = len(chunk_layout(part.segments, part.keeps).chunks)
        assert chunks <= most or (not part.keeps and sum(s.after is None for s in part.segments) == 1)
        assert not part.keeps or len(part.segments) == 1
        assert not part.keeps or part.last == original.first + original.length or (part.last - original.first) % 64 == 0
    assert row == first and next(whole, None) is None


@pytest.mark.parametrize("length", [1, 3, 70, 300])
def test_recurrences_of_short_sequences_fit_the_memory_that_is_planned(length):
    family = read_model(GGUFFile(ROOT / "tests/data/qwen35-tied-nextn.gguf"))
    facts, kernel_set, n = Facts((9, 0)), kernel_set_of((9, 0)), 8400
    segments = tuple(Segment(at, min(length, n - at)) for at in range(0, n, length))
    ids = np.zeros(n, np.int32)
    batch = Batch(ids, segments=segments, targets=Targets(np.arange(n, dtype=np.int32), ids, 32))
    planned = rehearse(family, facts, kernel_set, planned_batch(n, ranks=True), "ranks").work_bytes
    tables = 64 * len(segments) + (256 << 10)  # which rows and chunks are whose
    assert rehearse(family, facts, kernel_set, batch, "ranks").work_bytes <= planned + tables


def test_packed_batches_fit_the_memory_that_is_planned():
    """What a batch with as many rows of keys as may be takes is no more than the plan for batches of its length has."""
    family = read_model(SyntheticFile.named("tiny:Q4_K_M"))
    facts, kernel_set = Facts((9, 0)), kernel_set_of((9, 0))
    n = 4096
    prompts = [Segment(i * 256, 128 + 100, 0) for i in range(n // 256)]
    more = [Segment(s.first + 228, 28, 228, after=i) for i, s in enumerate(prompts)]
    segments = sorted([*prompts, *more], key=lambda s: s.first)
    places = {segment: i for i, segment in enumerate(segments)}
    segments = [replace(s, after=None if s.after is None else places[prompts[s.after]]) for s in segments]
    ids = np.zeros(n, np.int32)
    batch = Batch(ids, segments=tuple(segments), targets=Targets(np.arange(n, dtype=np.int32), ids, 32))
    rows = attention_layout(batch.segments, kernel_set.attention(64, 64)).rows
    assert n < rows <= KEYS_PER_TOKEN * n
    planned = rehearse(family, facts, kernel_set, planned_batch(n, ranks=True), "ranks").work_bytes
    tables = 256 << 10  # which rows are whose
    assert rehearse(family, facts, kernel_set, batch, "ranks").work_bytes <= planned + tables


def test_a_page_that_casts_what_nothing_bounds_is_refused():
    family = read_model(SyntheticFile.named("tiny:Q4_K_M"))

    def layer(ops, w, x, index):
        q, k, v = ops.qkv(ops.norm(x, w.attn_norm), w.attn_q, w.attn_k, w.attn_v, rope=family.rope)
        x = ops.linear(ops.attention(q, k, v, scale=1.0), w.attn_output, residual=x)  # no norm's output
        return ops.add_rms_norm(
            x, ops.mlp(ops.cast(x), w.ffn_gate, w.ffn_up, w.ffn_down, activation="silu"), w.ffn_norm
        )

    family.layer = layer
    with pytest.raises(ModelError, match="qwen3: this family's page casts a residual stream"):
        rehearse(family, Facts((9, 0)), kernel_set_of((9, 0)), Batch(np.zeros(5, np.int32)))


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
    work, maps = Workspace(gpu), SimpleNamespace(generation=0)
    graphs, calls = Graphs(gpu, lambda: (work.generation, maps.generation)), []

    def run(n):
        before = len(calls)
        graphs.run(n, lambda: calls.append(n))
        return len(calls) > before  # whether it was launched, rather than a graph of it

    assert [run(5), run(5), run(5), run(5)] == [True, True, False, False]
    assert [run(6), run(5)] == [True, False]
    work.array("anything", FLOAT32, 25)  # more memory moves nothing, but growing does
    assert run(5) is False
    work.array("anything", FLOAT32, 250)
    assert [run(5), run(5), run(5)] == [True, True, False]
    maps.generation += 1
    assert [run(5), run(5), run(5)] == [True, True, False]

    def growing(n):
        """A prompt whose last layers need larger arrays than the first."""
        calls.append(n)
        work.array("anything", FLOAT32, 250)
        work.array("anything", FLOAT32, 500)

    before = len(calls)
    for _ in range(4):
        graphs.run(7, lambda: growing(7))
    assert len(calls) - before == 3  # what the first made was for arrays that moved; the third was captured
    assert [run(3000) for _ in range(4)] == [True, True, False, False]
    assert calls.count(3000) == 3  # the second was launched, and then captured
