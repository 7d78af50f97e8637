import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from marble import MarbleError
from marble.balance.dual_cone import keep_floors
from marble.balance.torchjd import TORCHJD, torchjd_weights

from .awkward import gradients

KINDS = ["plain", "duplicate", "opposite", "nearly opposite", "zero", "all equal", "summing to zero", "uneven"]
BY_TORCHJD = ["pcgrad", "imtl-g", "aligned-mtl"]


def theirs(name, g):
    """TorchJD's own weights for gradients `[K, P]`, divided by their sum."""
    if name in ("upgrad", "dualproj"):
        pytest.importorskip("quadprog")
        pytest.importorskip("qpsolvers")
    elif name == "cagrad":
        pytest.importorskip("cvxpy")
    elif name == "nash-mtl":
        pytest.importorskip("ecos")
        pytest.importorskip("cvxpy")
    from torchjd import aggregation, linalg

    gram = g @ g.T
    if name in ("upgrad", "dualproj"):
        exact = linalg.QuadprogProjector(norm_eps=0, reg_eps=0)
        kind = aggregation.UPGradWeighting if name == "upgrad" else aggregation.DualProjWeighting
        weights = kind(projector=exact)(gram)
    elif name == "cagrad":
        weights = aggregation.CAGradWeighting(c=0.4)(gram)
    elif name == "nash-mtl":
        weights = aggregation.NashMTL(len(g)).weighting(g)
    elif name == "pcgrad":
        torch.manual_seed(0)
        weights = aggregation.PCGradWeighting()(gram)
    else:
        weights = {"imtl-g": aggregation.IMTLGWeighting, "aligned-mtl": aggregation.AlignedMTLWeighting}[name]()(gram)
    return weights / weights.sum()


# TorchJD's are iterations for these two, and stop earlier than ours
ROUGH = {"cagrad": 1e-4, "nash-mtl": 1e-6}


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("name", TORCHJD)
def test_agrees_with_torchjd(name, count):
    compared = 0
    for seed in range(8):
        g = gradients("plain", count, 14, seed)
        expected = theirs(name, g)
        if name == "imtl-g" and (g @ (expected @ g)).max() < 0:
            continue  # turned round, where we are uniform on purpose
        assert torchjd_weights(name, g @ g.T).tolist() == pytest.approx(expected.tolist(), abs=ROUGH.get(name, 1e-10))
        compared += 1
    assert compared >= 6


# What TorchJD 0.18.0 with all its solvers gave for gradients (4, 0, 0, 0), (−3, 1, 0, 0) and (1, 1, 2, 1).
# By hand for dualproj: the mean's product with g_1 is (−12 + 10 − 2) / 3 = −4/3, which 2/15 more of g_1 mend;
# (1/3, 1/3 + 2/15, 1/3) is (5, 7, 5) / 15, and divided by its sum (5, 7, 5) / 17.
RECORDED = {
    "upgrad": (0.339805825, 0.466019417, 0.194174757),
    "dualproj": (5 / 17, 7 / 17, 5 / 17),
    "cagrad": (0.289345977, 0.421308046, 0.289345977),
    "nash-mtl": (0.375641834, 0.505593978, 0.118764188),
    "pcgrad": (0.312916112, 0.447403462, 0.239680426),
    "imtl-g": (0.483779228, 0.591891647, -0.075670875),
    "aligned-mtl": (0.413437494, 0.516374414, 0.070188092),
}


@pytest.mark.parametrize("name", TORCHJD)
def test_agrees_with_what_torchjd_gave(name):
    gram = torch.tensor([[16.0, -12.0, 4.0], [-12.0, 10.0, -2.0], [4.0, -2.0, 7.0]])
    assert torchjd_weights(name, gram).tolist() == pytest.approx(RECORDED[name], abs=2e-9)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TORCHJD)),
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 12),
    width=st.integers(1, 20),  # below `count` the Gram is singular
    scale=st.sampled_from([1e-12, 1e-4, 1.0, 1e12]),
    single=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_finite_and_summing_to_one_for_awkward_grams(name, kind, count, width, scale, single, seed):
    g = gradients(kind, count, width, seed)
    gram = ((g.float() @ g.float().T) if single else g @ g.T) * scale
    weights = torchjd_weights(name, gram)
    assert weights.shape == (count,)
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    assert abs(weights.sum().item() - 1) <= 1e-12 * count * weights.abs().max().item()
    assert name in ("imtl-g", "aligned-mtl") or (weights >= 0).all()
    assert torch.equal(weights, torchjd_weights(name, gram))


@pytest.mark.parametrize("name", TORCHJD)
def test_the_scale_of_the_gradients_does_not_count(name):
    for seed in range(5):
        g = gradients("plain", 5, 12, seed)
        expected = torchjd_weights(name, g @ g.T).tolist()
        for scale in (1e-12, 1e-6, 1e-3, 1e5, 1e12):
            assert torchjd_weights(name, scale * (g @ g.T)).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", TORCHJD)
def test_simple_grams_by_hand(name):
    assert torchjd_weights(name, torch.eye(2)).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
    assert torchjd_weights(name, torch.tensor([[3.0]])).tolist() == pytest.approx([1.0], abs=1e-12)
    assert torchjd_weights(name, torch.zeros(4, 4)).tolist() == [0.25] * 4
    against = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torchjd_weights(name, against).tolist() == pytest.approx([0.5, 0.5], abs=1e-7)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "nash-mtl"])
def test_opposes_no_gradient(name):
    for seed in range(10):
        g = gradients("plain", 6, 9, seed)
        assert (g @ (torchjd_weights(name, g @ g.T) @ g)).min() > -1e-9


def test_nash_mtl_solves_its_equation():
    """`a_k (G a)_k` is the same for all k, however long the gradients are."""
    for seed in range(10):
        for kind in ("plain", "uneven"):
            g = gradients(kind, 6, 9, seed)
            weights = torchjd_weights("nash-mtl", g @ g.T)
            shares = weights * (g @ (weights @ g))
            assert (shares / shares.mean()).tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_nash_mtl_leaves_out_what_is_zero():
    gram = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    assert torchjd_weights("nash-mtl", gram).tolist() == pytest.approx([0, 2 / 3, 1 / 3], abs=1e-12)


def best_least_product(g, radius):
    """The largest `min_k g_k · d` over directions d within `radius` of the mean, by SLSQP on d and that product."""
    mean = g.mean(axis=0)
    bounds = [
        {"type": "ineq", "fun": lambda x: g @ x[:-1] - x[-1]},
        {"type": "ineq", "fun": lambda x: radius**2 - np.square(x[:-1] - mean).sum()},
    ]
    start = np.append(mean, (g @ mean).min())
    return minimize(lambda x: -x[-1], start, constraints=bounds, method="SLSQP", options={"ftol": 1e-12}).x[-1]


def test_cagrad_serves_the_worst_off_best():
    """No direction within 0.4 |g_0| of the mean g_0 has a larger least product with the gradients."""
    for seed in range(8):
        g = gradients("plain", 4, 6, seed)
        mean = g.mean(dim=0)
        radius = 0.4 * mean.norm().item()
        ours = torchjd_weights("cagrad", g @ g.T) @ g
        # our direction has lost its length: the ray meets |d − mean| = radius twice, and the better point is meant
        half, square = (ours @ mean / (ours @ ours)).item(), (mean @ mean / (ours @ ours)).item()
        root = half**2 - square + radius**2 / (ours @ ours).item()
        least = max((g @ (s * ours)).min().item() for s in (half + root**0.5, half - root**0.5))
        found = best_least_product(g.numpy(), radius)
        assert least == pytest.approx(found, abs=1e-6)


def test_imtl_g_is_uniform_where_torchjd_turns_round():
    # (1, 1, −2 √2) has product 1 with the unit vectors along all three gradients; it is 15 g_0 + 15 g_1 − 200 g_2.
    # TorchJD divides by 15 + 15 − 200 = −170.
    from torchjd.aggregation import IMTLGWeighting

    g = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.07, 0.07, 0.1 * 0.02**0.5]], dtype=torch.float64)
    theirs = IMTLGWeighting()(g @ g.T)
    assert theirs.tolist() == pytest.approx([-15 / 170, -15 / 170, 200 / 170], abs=1e-9)
    assert (g @ (theirs @ g)).max() < 0
    assert torchjd_weights("imtl-g", g @ g.T).tolist() == [1 / 3] * 3


def test_pcgrad_draws_its_orders_from_the_seed_alone():
    g = gradients("plain", 6, 5, 0)
    gram = g @ g.T
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = torchjd_weights("pcgrad", gram, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torchjd_weights("pcgrad", gram, seed=3), first)
    assert not torch.equal(torchjd_weights("pcgrad", gram, seed=4), first)


def test_dualproj_is_the_mean_kept_above_all_floors():
    g = gradients("plain", 5, 6, 2)
    kept = keep_floors(g @ g.T, torch.full((5,), 0.2), torch.ones(5, dtype=torch.bool))
    assert torchjd_weights("dualproj", g @ g.T).tolist() == pytest.approx((kept / kept.sum()).tolist(), abs=1e-12)


@pytest.mark.parametrize("name", TORCHJD)
def test_without_torchjd(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd", None)  # importing it raises ImportError
    if name in BY_TORCHJD:
        with pytest.raises(MarbleError, match=rf'"{name}" needs TorchJD.*pip install "marble-diffusion\[torchjd\]"'):
            torchjd_weights(name, torch.eye(2))
    else:
        assert torchjd_weights(name, torch.eye(2)).tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


def test_unknown_name():
    with pytest.raises(MarbleError, match=r'no TorchJD method "upgrd".* Did you mean "upgrad"\?'):
        torchjd_weights("upgrd", torch.eye(2))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(3), torch.full((2, 2), torch.nan)])
@pytest.mark.parametrize("name", TORCHJD)
def test_refuses_what_is_not_a_gram(name, bad):
    with pytest.raises(ValueError, match="gram must be"):
        torchjd_weights(name, bad)
