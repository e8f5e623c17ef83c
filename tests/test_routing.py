"""Which experts a token goes to, and with what shares (kernels/include/routing.cuh), for numbers of experts on both
sides of what a lane holds in registers. On emulated kernels, and (gpu) on a device."""

from types import SimpleNamespace

import numpy as np
import pytest

from kqprefill.backends.cpu.functions import best_experts, sigmoid, softmax
from kqprefill.backends.cuda.device.arrays import FLOAT32, INT32
from kqprefill.backends.cuda.ops.experts import _ROUTED_A_BLOCK
from kqprefill.backends.cuda.programs import EXPERTS
from test_int8 import device  # noqa: F401  # a fixture

TOKENS = 21  # not a whole number of blocks


def routed(device, kernel, scores, used, **given):  # noqa: F811
    """The experts and their shares, [tokens, used] each. given: what a test tells the kernel beside the usual."""
    n, experts = scores.shape
    own = {"expert_scale": None, "routed_after": 0}
    if kernel == "route_biased":
        own = {"expert_scale": None, "bias": None, "sigmoid": 0, "scale": 1.0, "groups": 4, "groups_used": 2}
    own |= given
    chosen, shares = device.poisoned("chosen", INT32, n, used), device.poisoned("shares", FLOAT32, n, used)
    given = {"scores": device.work.upload("scores", scores), "n": n, "experts": experts, "used": used, "normalise": 1}
    outputs = {"expert_of": chosen, "share_of": shares}
    device.launcher.launch(EXPERTS, kernel, grid=-(-n // _ROUTED_A_BLOCK), **given, **outputs, **own)
    return device.get(chosen), device.get(shares)


@pytest.mark.parametrize("experts,used", [(1, 1), (8, 2), (60, 4), (128, 8), (129, 8), (256, 8), (257, 3), (1000, 32)])
def test_by_the_scores_themselves(device, experts, used, rng):  # noqa: F811
    scores = rng.standard_normal((TOKENS, experts)).astype(np.float32)
    scores[:, : experts // 2] = np.round(scores[:, : experts // 2])  # equal ones
    scale = rng.uniform(0.5, 2, experts).astype(np.float32)
    chosen, shares = routed(device, "route", scores, used, expert_scale=device.work.upload("scale of experts", scale))
    expected = best_experts(scores, SimpleNamespace(groups=1, used=used))
    assert np.array_equal(chosen, expected)
    of_chosen = np.take_along_axis(scores, expected, axis=1).astype(np.float64)
    np.testing.assert_allclose(shares, softmax(of_chosen.copy()) * scale[expected], rtol=1e-5)


@pytest.mark.parametrize("experts,used,groups", [(64, 6, 8), (160, 6, 8), (256, 8, 8), (300, 8, 1), (512, 22, 4)])
@pytest.mark.parametrize("by_sigmoid", [0, 1])
def test_by_probabilities_and_biases(device, experts, used, groups, by_sigmoid, rng):  # noqa: F811
    """Among the experts of the best groups, which need not be a warp's lanes wide."""
    scores = rng.standard_normal((TOKENS, experts)).astype(np.float32)
    bias = rng.uniform(-0.1, 0.1, experts).astype(np.float32)
    groups_used = max(1, groups // 2)
    own = {"bias": device.work.upload("biases", bias), "sigmoid": by_sigmoid, "scale": 2.5}
    chosen, shares = routed(device, "route_biased", scores, used, groups=groups, groups_used=groups_used, **own)
    probabilities = sigmoid(scores) if by_sigmoid else softmax(scores.copy())
    expected = best_experts(probabilities + bias, SimpleNamespace(groups=groups, groups_used=groups_used, used=used))
    of_chosen = np.take_along_axis(probabilities, chosen, axis=1)
    # What is as good to a float's last bits may come in another order, or be another one.
    wanted = np.take_along_axis(probabilities + bias, expected, axis=1)
    np.testing.assert_allclose(np.take_along_axis(probabilities + bias, chosen, axis=1), wanted, rtol=1e-5, atol=1e-7)
    assert (np.diff(np.sort(chosen)) > 0).all() and (chosen == expected).mean() > 0.95
    np.testing.assert_allclose(shares, 2.5 * of_chosen / of_chosen.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("experts,used", [(8, 2), (60, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("kernel", ["route", "route_biased"])
def test_scores_that_are_not_numbers(device, kernel, experts, used, rng):  # noqa: F811
    """Whatever the scores, a token has `used` experts that there are, and none twice: what follows counts on it."""
    scores = rng.standard_normal((50, experts)).astype(np.float32)
    for value, share in ((np.inf, 0.1), (-np.inf, 0.1), (np.nan, 0.2)):
        scores[rng.random(scores.shape) < share] = value
    scores[::3] = np.nan
    found, _ = routed(device, kernel, scores, used)
    assert found.min() >= 0 and found.max() < experts and (np.diff(np.sort(found)) > 0).all()


@pytest.mark.parametrize("experts,used", [(8, 2), (60, 4), (128, 8), (1000, 32)])
def test_of_equal_scores_the_lowest_experts(device, experts, used, rng):  # noqa: F811
    """Also of zeros with both signs, and of scores below zero."""
    scores = rng.integers(-3, 1, (50, experts)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -0.0
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :used]
    assert np.array_equal(routed(device, "route", scores, used)[0], expected)
