"""Every CUDA op against the NumPy op on the same inputs, as the layers of models of many shapes call them."""

from gguf.constants import GGMLQuantizationType as GGML
import numpy as np
import pytest

from conftest import kl_divergence, relative_error
import kqprefill
from kqprefill.backends.cpu.ops import CpuOps
from kqprefill.backends.cuda.device.workspace import Workspace
from kqprefill.backends.cuda.gemm import hopper
from kqprefill.backends.cuda.gemm.operand import Operand
from kqprefill.backends.cuda.ops.batch import Residual
from kqprefill.backends.cuda.ops.context import Context
from kqprefill.backends.cuda.ops.cuda_ops import CudaOps
from kqprefill.core import Batch, no_progress
from kqprefill.gguf import GGUFFile
from kqprefill.models import read_model
from kqprefill.models.weights import Weight
from kqprefill.synthetic import SyntheticFile, SyntheticTensor, write_gguf
from op_models import EXPERTS, GEMMA, GPT_OSS, MODELS, shape

pytestmark = pytest.mark.gpu

# Halves have 11 bits: an operand is off by 2.8e-4 at most, 1.6e-4 in the mean, and a chain of ops by a few of these.
TOLERANCE = 2e-3
# The gated norm makes of q · k, however small it is beside q and k, an output as large as any other.
TOLERANCES = {"delta_net": 2e-2}
# Gemma 4 does not scale its scores: they are in the tens, where a half's last bits move a weight by a hundredth.
GEMMA4 = TOLERANCES | {"attention": 4e-3, "linear": 4e-3}  # attention's output is what linear multiplies


class PoisonedWorkspace(Workspace):
    """A Workspace whose outputs are NaN until a kernel writes them."""

    OUTPUTS = "normed", "qkv", "q", "k", "v", "logits", "activated", "dequantised", "linear", "residual"
    OUTPUTS += "gates", "delta", "delta sums", "delta rates", "delta gates", "delta outputs"
    OUTPUTS += "latent rows", "latent keys", "latent query rows", "latent sums", "latent value sums"
    OUTPUTS += "latent matrix", "latent matrix decoded"
    OUTPUTS += "embeddings for the layers", "of the table", "embedding gates", "gated embedding", "row scales"
    OUTPUTS += tuple(f"{name} of layer {layer}" for name in "kv" for layer in range(2))
    OUTPUTS += tuple(f"delta {name}" for name in "q k v w u p decay states".split())

    def array(self, name, dtype, *shape):
        array = super().array(name, dtype, *shape)
        if name in self.OUTPUTS:
            self._gpu.upload(array.address, np.full(array.nbytes, 0xFF, np.uint8))
        return array


def poisoned(c):
    """A backend's Context with such a workspace."""
    work = PoisonedWorkspace(c.gpu)
    return Context.of(c.gpu, c.kernel_set, c.launcher, work, c.downloads, c.maps, c.weights, c.small)


class BothOps:
    """Runs each op on both backends and compares. A value is (what the CPU has, what the GPU has)."""

    def __init__(self, cpu, cuda):
        self.cpu, self.cuda = cpu, cuda
        self.tolerances = GEMMA4 if cpu.config.architecture == "gemma4" else TOLERANCES

    def begin_layer(self, index):
        self.cpu.begin_layer(index)
        self.cuda.begin_layer(index)

    def _floats(self, array):
        values = np.empty(array.shape, np.float32)
        self.cuda.context.gpu.download(values, array.address)
        return values

    def _halves(self, array, scale, columns):
        """The first columns of rows of halves, by their scale."""
        halves, factor = np.empty(array.shape, np.float16), np.empty(1, np.float32)
        self.cuda.context.gpu.download(halves, array.address)
        self.cuda.context.gpu.download(factor, scale.address)
        halves = halves.reshape(-1, array.shape[-1])[:, :columns]
        assert np.isfinite(halves).all() and np.abs(halves).max() <= 2.0**15
        return halves.astype(np.float32) / factor

    def _operand(self, operand):
        """Its columns are in the order of kernels/include/operand.cuh."""
        stride = operand.values.shape[1]
        stored = self._halves(operand.values, operand.scale, stride)
        group, part, pair, second, odd = np.ix_(range(stride // 64), range(4), range(4), range(2), range(2))
        column = 64 * group + 16 * pair + 4 * part + 2 * second + odd  # of what is stored, pair after pair
        values = np.empty_like(stored)
        values[:, column.transpose(0, 1, 3, 2, 4).reshape(-1)] = stored
        return values[:, : operand.columns]

    def _note(self, op, expected, got):
        error = relative_error(expected, got)
        assert error <= self.tolerances.get(op, TOLERANCE), f"{op}: relative error {error:.1e}"

    def __getattr__(self, op):
        def both(*args, **kwargs):
            pick = [lambda v, i=i: v[i] if isinstance(v, tuple) else v for i in (0, 1)]
            results = [
                getattr(ops, op)(*map(pick[i], args), **{k: pick[i](v) for k, v in kwargs.items()})
                for i, ops in enumerate((self.cpu, self.cuda))
            ]
            return self._compare(op, *results)

        return both

    def _compare(self, op, expected, got):
        if op == "embed_for_layers":
            made = self._floats(self.cuda._embeddings)
            self._note(op, self.cpu._embeddings.reshape(made.shape), made)
            return None
        if op in ("qkv", "gated_qkv"):  # gates are looked at where they have been applied
            for name, e, g in zip("qkv", expected, got):
                tokens, heads, dim = e.shape
                self._note(name, e.reshape(tokens * heads, dim), self._halves(g.values, g.scale, dim))
            return tuple(zip(expected, got))
        if isinstance(got, Operand):
            self._note(op, expected, self._operand(got))
        else:
            array = got.values if isinstance(got, Residual) else got
            self._note(op, expected, self._floats(array))
            # The next op has the CPU's values, so that errors do not add up from layer to layer.
            self.cuda.context.gpu.upload(array.address, np.ascontiguousarray(expected))
        return expected, got


@pytest.fixture(scope="module", params=["auto", "portable"])
def cuda(request):
    """A backend with the kernels chosen for this GPU, or with those of every GPU."""
    from kqprefill.backends.cuda.backend import CudaBackend

    backend = CudaBackend(0, request.param)
    yield backend
    backend.close()


@pytest.mark.parametrize("n", [1, 7, 129, 300])
@pytest.mark.parametrize("name", MODELS)
def test_ops(cuda, name, n, rng):
    description, kind = MODELS[name]
    family = read_model(SyntheticFile(description, kind if callable(kind) else lambda *_: kind, name))
    cuda.load(family, no_progress)
    context = poisoned(cuda.context)
    batch = Batch(rng.integers(0, description.vocab, n).astype(np.int32))
    try:
        both = BothOps(CpuOps(family, batch, None), CudaOps(context, family, batch, None))
        x = family.forward(both)
        expected, got = (family.finish(ops, x[i], "all")() for i, ops in enumerate((both.cpu, both.cuda)))
        assert relative_error(expected.logits, got.logits) <= TOLERANCE
        assert got.logit == got.logits[-1].max() and got.token == int(got.logits[-1].argmax())
    finally:
        context.work.close()
        cuda.unload()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("qwen")])
@pytest.mark.parametrize("more", ["soft-cap", "sinks"])
def test_attention_with(cuda, name, window, more, rng):
    description, kind = MODELS[name]
    family = read_model(SyntheticFile(description, lambda *_: kind, name))
    cuda.load(family, no_progress)
    try:
        batch, w = Batch(rng.integers(0, description.vocab, 300).astype(np.int32)), family.blocks[0]
        both = BothOps(CpuOps(family, batch, None), CudaOps(cuda.context, family, batch, None))
        h = both.norm(both.embed(family.token_embd), w.attn_norm)
        q, k, v = both.qkv(h, w.attn_q, w.attn_k, w.attn_v, rope=family.rope)
        scale = 1.0 if more == "soft-cap" else 0.01  # scores that are capped, or that leave a sink its share
        free = both.cpu.attention(q[0], k[0], v[0], scale=scale, window=window)
        sinks = Weight(SyntheticTensor("attn_sinks.weight", (family.config.head_count,), GGML.F32))
        changed = both.attention(
            q, k, v, scale=scale, window=window, **({"softcap": 0.5} if more == "soft-cap" else {"sinks": sinks})
        )
        assert relative_error(changed[0], free) > 10 * TOLERANCE  # it does something
    finally:
        cuda.unload()


class ModelOfConfig:
    """A small model whose products are multiplied by a GEMM configuration of our choice."""

    def __init__(self, shape, rng):
        self.shape = shape
        self.tokens = rng.integers(0, shape.vocab, 300)
        self.expected = self.logits(None)

    def logits(self, config):
        """Of 5 and of 300 tokens."""
        from kqprefill.engine.model import open_model

        def kind(name, _):
            if name == "ffn_gate_inp":
                return GGML.F32
            return GGML.Q6_K if "attn_v" in name or "down" in name else GGML.Q4_K

        best_config = hopper.best_config

        def choose(m, row_tiles, gated, *rest):
            if config is not None and config.gated == gated:
                return config
            return best_config(m, row_tiles, gated, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "best_config", choose)
            with open_model(SyntheticFile(self.shape, kind, "configurations"), "cuda") as model:
                if model.backend.kernel_set.name != "Hopper":
                    pytest.skip("configurations of Hopper's GEMM")
                return [model.prefill(self.tokens[:n], logits="all").logits for n in (5, 300)]


@pytest.fixture(scope="module", params=[shape("qwen3", 768, 8, 2, 64, 1280, 161), EXPERTS], ids=["dense", "experts"])
def model_of_config(request, module_rng):
    return ModelOfConfig(request.param, module_rng)


@pytest.mark.parametrize(
    "config", hopper.CONFIGS, ids=lambda c: f"{'gated' if c.gated else 'linear'} {c.tokens}x{c.warpgroups}x{c.tiles}"
)
def test_every_configuration_gives_the_same_bits(model_of_config, config):
    """Whichever shape of tile multiplies, and however few tokens or rows of weights fill it."""
    for got, expected in zip(model_of_config.logits(config), model_of_config.expected):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize(
    "kind", [GGML.Q4_K, GGML.MXFP4, GGML.Q8_0, "mixed"], ids=lambda kind: getattr(kind, "name", kind)
)
@pytest.mark.parametrize("shape", [EXPERTS, GPT_OSS, GEMMA], ids=lambda s: s.architecture)
def test_experts(shape, kind, kernels, rng):
    """Against the CPU, where some experts have many tokens, some few or none; and cut into independent pieces."""
    from kqprefill.engine.model import open_model

    def model(backend):
        mixed = {"ffn_gate_exps": GGML.Q4_K, "ffn_up_exps": GGML.F16}
        own = mixed if kind == "mixed" else {}
        others = GGML.Q6_K if kind == "mixed" else kind
        file = SyntheticFile(
            shape, lambda name, _: GGML.F32 if name == "ffn_gate_inp" else own.get(name, others), "experts"
        )
        return open_model(file, backend, kernels=kernels)

    tokens = rng.integers(0, shape.vocab, 2000)
    with model("cpu") as cpu, model("cuda") as gpu:
        for n in (1, 7, 129, 2000):
            got = gpu.prefill(tokens[:n], logits="all").logits
            limit = 2e-2 if shape is GEMMA else 1e-4  # see GEMMA4; one of few tokens may go to another expert
            assert kl_divergence(cpu.prefill(tokens[:n], logits="all").logits, got) <= limit
        cache, at = gpu.new_cache(2000), 0
        for n in (3, 300, 1697):
            part = gpu.prefill(tokens[at : at + n], logits="all", cache=cache).logits
            assert np.array_equal(part, got[at : at + n])
            at += n


@pytest.mark.parametrize("factor", [1e3, 1e-6])
def test_activations_far_outside_half_precision(factor, tmp_path, rng):
    """Gate and up scaled so that their product is far beyond 65504, or far below 2^-24: no inf, and no loss either."""
    path = tmp_path / "sound.gguf"
    write_gguf(SyntheticFile.named("tiny:F32"), path)
    raw = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.attn_v.weight", "token_embd.weight"):
            tensor = file.tensors[name]
            values = np.frombuffer(tensor.data.tobytes(), np.float32) * np.float32(factor)
            raw[tensor.offset : tensor.offset + tensor.nbytes] = values.tobytes()
    planted = tmp_path / "planted.gguf"
    planted.write_bytes(raw)
    tokens = rng.integers(0, 160, 100)
    logits = []
    for backend in ("cpu", "cuda"):
        with kqprefill.load(planted, backend=backend) as model:
            logits.append(model.prefill(tokens, logits="all").logits)
    assert np.isfinite(logits[1]).all()
    assert kl_divergence(*logits) <= 1e-5


def test_an_allocation_that_fails_is_one_line(cuda):
    with pytest.raises(kqprefill.BackendError, match="out of memory"):
        cuda.gpu.allocate(1 << 50, "a test")


@pytest.mark.parametrize("kind", ["random", "few values", "equal", "some -inf", "descending"])
@pytest.mark.parametrize("n", [1, 7, 1000, 5003, 151936])
def test_ranks_of_logits(cuda, n, kind, rng):
    """A target's log-probability and the likeliest tokens, the lowest ids of equals first, of rows of any length."""
    from kqprefill.backends.cuda.ops.head import RANKED
    from kqprefill.backends.cuda.programs import HEAD

    rows = 3
    logits = (3 * rng.standard_normal((rows, n))).astype(np.float32)
    if kind == "few values":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "some -inf":
        logits[:, 1::2] = -np.inf
    elif kind == "descending":
        logits = -np.sort(-logits, axis=1)
    targets = rng.integers(0, n, rows).astype(np.int32)
    order = np.argsort(-logits, axis=1, kind="stable")
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    uploaded = {"logits": cuda.work.upload("rank logits", logits), "targets": cuda.work.upload("rank targets", targets)}

    def rank(top):
        found = np.empty((rows, top + 1), RANKED)
        out = cuda.work.array("rank out", RANKED, *found.shape)
        cuda.gpu.upload(out.address, np.full(found.nbytes, 0xFF, np.uint8))
        cuda.launcher.launch(HEAD, "rank", grid=rows, **uploaded, n=n, top=top, out=out)
        cuda.gpu.download(found, out.address)
        return found

    for top in sorted({min(n, top) for top in (1, 2, 33, 256, 257, 1030, 5000)}):
        found = rank(top)
        assert np.array_equal(found["token"][:, 0], targets) and np.array_equal(found["token"][:, 1:], order[:, :top])
        wanted = np.take_along_axis(exact, found["token"].astype(int), axis=1)
        finite = np.isfinite(wanted)
        assert (
            np.abs(found["logprob"][finite] - wanted[finite]).max() <= 1e-5
            and (found["logprob"][~finite] == -np.inf).all()
        )
    logits[1, n // 2] = np.nan
    cuda.gpu.upload(uploaded["logits"].address, logits)
    found = rank(top)
    assert (
        (found["token"][1] == -1).all() and np.isnan(found["logprob"][1]).all() and (found["token"][[0, 2]] >= 0).all()
    )
