"""Token-aware KL: Appendix B's properties, gradients against autograd in float64, chunked against whole."""

import math
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from properties import for_all
from qwen import QWEN
from whole_kl import gradients, random_inputs, whole

from kl import (
    TIME_SEPARATORS,
    chunked_weighted_kl,
    k1,
    k2,
    k3,
    subset_kl,
    time_token_ids,
    weighted_kl,
)

V = 6
LOGITS = st.lists(st.floats(-30, 30), min_size=V, max_size=V)
SUBSETS = st.integers(0, 2**V - 1).map(lambda bits: torch.tensor([bool(bits >> k & 1) for k in range(V)]))


def logp(logits):
    return torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)


# --- Eq. 4 and its properties (Appendix B)


def test_subset_kl_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]).double().log(), torch.tensor([0.25, 0.25, 0.5]).double().log()
    assert float(subset_kl(p, q, torch.tensor([0]))) == pytest.approx(0.25 - 0.5 + 0.5 * math.log(2))
    assert float(subset_kl(p, q, torch.tensor([1]))) == pytest.approx(0)
    assert float(subset_kl(p, q, torch.tensor([2]))) == pytest.approx(0.25 - 0.25 * math.log(2))
    assert float(subset_kl(p, q, torch.tensor([0, 1, 2]))) == pytest.approx(0.25 * math.log(2))
    assert torch.equal(subset_kl(p, q, torch.tensor([True, False, True])), subset_kl(p, q, torch.tensor([0, 2])))


@for_all(LOGITS, LOGITS, SUBSETS)
def test_never_negative_and_zero_only_where_equal(p, q, subset):
    p, q = logp(p), logp(q)
    value = float(subset_kl(p, q, subset))
    assert value >= -1e-15
    assert float(subset_kl(p, p, subset)) == 0
    if ((p.exp() - q.exp()).abs() * subset).max() > 1e-6:
        assert value > 0
    outside = torch.where(subset, p, p[~subset].logsumexp(0) - math.log(max(1, V - int(subset.sum()))))
    assert float(subset_kl(p, outside, subset)) == 0  # p = q on S is enough


def test_rows_of_a_batch_are_independent():
    p, q = torch.log_softmax(torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)), -1)
    rows = torch.stack([subset_kl(p[i], q[i], torch.tensor([0, 2])) for i in range(3)])
    assert torch.equal(subset_kl(p, q, torch.tensor([0, 2])), rows)


@for_all(LOGITS, LOGITS)
def test_the_whole_vocabulary_gives_the_usual_kl(p, q):
    p, q = logp(p), logp(q)
    usual = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert float(subset_kl(p, q, torch.arange(V))) == pytest.approx(float(usual), abs=1e-12)


@for_all(LOGITS, LOGITS, SUBSETS)
def test_disjoint_subsets_add_up(p, q, subset):
    p, q = logp(p), logp(q)
    parts = subset_kl(p, q, subset) + subset_kl(p, q, ~subset)
    assert float(parts) == pytest.approx(float(subset_kl(p, q, torch.arange(V))), abs=1e-12)


@for_all(st.lists(st.floats(-3, 3), min_size=V, max_size=V), st.integers(1, V - 1))
def test_the_naive_masked_sum_has_its_minimum_below_zero(q, size):
    """The paper's footnote 1: sum_S p log(p / q) falls to -q(S) / e where p = q / e on S; D^S is positive there."""
    q = logp(q).exp()
    subset = torch.arange(size)
    p = q.clone()
    p[subset] /= math.e
    p[size:] *= (1 - p[subset].sum()) / q[size:].sum()
    assert float(p.sum()) == pytest.approx(1)
    naive = (p * (p / q).log())[subset].sum()
    assert float(naive) == pytest.approx(-float(q[subset].sum()) / math.e)
    assert float(naive) < 0 < float(subset_kl(p.log(), q.log(), subset))


def test_a_search_finds_the_naive_sum_negative():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(1000, V, generator=g, dtype=torch.float64), -1) for _ in range(2))
    subset = torch.tensor([0, 1])
    naive = (p.exp() * (p - q))[:, subset].sum(-1)
    assert (naive < -0.01).any()
    assert (subset_kl(p, q, subset) >= 0).all()


@pytest.mark.parametrize(
    ("p", "q", "value"),
    [
        ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], math.inf),  # q(S) = 0 < p(S)
        ([0.0, 0.5, 0.5], [0.0, 0.5, 0.5], 0.0),  # q(S) = p(S) = 0
        ([0.0, 0.5, 0.5], [0.3, 0.2, 0.5], 0.3),  # p(S) = 0 < q(S): q(S) remains
    ],
)
def test_boundary_cases_of_appendix_b(p, q, value):
    p, q = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()
    assert float(subset_kl(p, q, torch.tensor([0]))) == pytest.approx(value)
    weights = torch.tensor([1.0, 0.0, 0.0])
    assert float(weighted_kl(p, q, weights)) == pytest.approx(value)


def test_subset_kl_is_differentiable_where_p_is_zero():
    p = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).log().requires_grad_()
    subset_kl(p, torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64).log(), torch.arange(3)).backward()
    assert torch.isfinite(p.grad).all()


# --- the weighted form


@for_all(LOGITS, LOGITS, SUBSETS)
def test_weighted_kl_is_the_mixture_of_subsets(p, q, subset):
    """LongVTG-R1 Eq. 5 with beta_time = 0.3 and beta_text = 2."""
    weights = 2.0 - 1.7 * subset.double()
    expected = 0.3 * subset_kl(logp(p), logp(q), subset) + 2 * subset_kl(logp(p), logp(q), ~subset)
    value = weighted_kl(*torch.tensor([p, q], dtype=torch.float64), weights)
    assert float(value) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@for_all(LOGITS, LOGITS, st.lists(st.floats(0, 2), min_size=V, max_size=V), st.floats(0.3, 3))
def test_closed_form_gradient_equals_autograd(p, q, weights, temperature):
    z = torch.tensor([p, q], dtype=torch.float64).requires_grad_()
    q = torch.tensor([q, p], dtype=torch.float64)
    weights = torch.tensor(weights, dtype=torch.float64)
    upstream = torch.tensor([1.7, -0.3], dtype=torch.float64)
    log_p, log_q = torch.log_softmax(z / temperature, -1), torch.log_softmax(q / temperature, -1)
    plain = (weights * (log_q.exp() - log_p.exp() + log_p.exp() * (log_p - log_q))).sum(-1)
    closed = weighted_kl(z, q, weights, temperature)
    assert torch.allclose(closed, plain, atol=1e-10)
    expected, found = (torch.autograd.grad((x * upstream).sum(), z)[0] for x in (plain, closed))
    assert (found - expected).abs().max() < 1e-10


def test_gradcheck_of_the_weighted_form():
    z, q = (torch.randn(3, V, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    assert torch.autograd.gradcheck(lambda z: weighted_kl(z, q, torch.arange(V), 0.7), z.requires_grad_())


def test_no_gradient_goes_to_the_reference():
    z, q = torch.randn(2, V, requires_grad=True), torch.randn(2, V, requires_grad=True)
    weighted_kl(z, q, torch.ones(V)).sum().backward()
    assert z.grad is not None and q.grad is None


def test_masked_logits_have_a_finite_gradient():
    z = torch.tensor([0.0, 1.0, -math.inf, 2.0], requires_grad=True)
    q = torch.tensor([0.5, -math.inf, -math.inf, 1.0])
    value = weighted_kl(z, q, torch.tensor([1.0, 0.0, 1.0, 1.0]))  # infinite where the weight is 0: not counted
    assert torch.allclose(value, subset_kl(torch.log_softmax(z, -1), torch.log_softmax(q, -1), torch.tensor([0, 2, 3])))
    value.backward()
    assert torch.isfinite(z.grad).all() and z.grad[2] == 0


def test_probabilities_that_underflow():
    """p = e^-200, far below float32: D = q - p + p a = q there, and the far side's divergence is about 200."""
    z, q = torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0])
    assert float(weighted_kl(z, q, torch.tensor([0.0, 1.0]))) == pytest.approx(1.0)
    assert float(weighted_kl(z, q, torch.tensor([1.0, 0.0]))) == pytest.approx(199.0)
    for b in (30.0, 39.0, 41.0, 80.0, 90.0, 110.0):  # across the switch of formulas and of float32's largest exponent
        z, q = torch.tensor([0.0, -b]), torch.tensor([0.0, 0.0])
        assert float(weighted_kl(z, q, torch.tensor([0.0, 1.0]))) == pytest.approx(0.5, rel=1e-5)
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(q, -1)
    assert float(subset_kl(log_p, log_q, torch.tensor([1]))) == pytest.approx(0.5)
    z, q = torch.tensor([0.0, -110.0]), torch.tensor([0.0, -50.0])  # p is 0 in float32, q is not
    assert float(weighted_kl(z, q, torch.tensor([0.0, 1.0]))) == pytest.approx(math.exp(-50))


def test_small_divergences_keep_their_digits_in_float32():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(64, 1000, generator=g)
    q = z + 1e-4 * torch.randn(64, 1000, generator=g)
    exact = weighted_kl(z.double(), q.double(), torch.ones(1000))
    assert exact.max() < 1e-8
    found = weighted_kl(z, q, torch.ones(1000))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weighted_kl_computes_in_float32_and_returns_gradients_in_the_inputs_type(dtype):
    z = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    q = torch.tensor([3.0, 2.0, 1.0], dtype=dtype)
    value = weighted_kl(z, q, torch.ones(3, dtype=dtype))
    assert value.dtype == torch.float32 == weighted_kl(z, q, torch.ones(3, dtype=torch.float64)).dtype
    assert float(value.detach()) == pytest.approx(float(weighted_kl(z.detach().double(), q, torch.ones(3))), rel=1e-6)
    value.backward()
    assert z.grad.dtype == dtype


def test_a_half_precision_reference_is_computed_in_float32_too():
    z, q = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(100)
    assert torch.equal(weighted_kl(z, q.bfloat16(), weights), weighted_kl(z, q.bfloat16().float(), weights))


# --- the chunked form


N, SIZES, CHUNKS, SEEDS = st.integers(0, 9), st.integers(6, 13), st.integers(1, 12), st.integers(0, 2**32 - 1)
OUTPUTS = [("kl",), ("logp",), ("entropy",), ("kl", "logp"), ("logp", "entropy"), ("kl", "logp", "entropy")]


def check_chunked(n, v, chunk, seed):
    inputs = random_inputs(n, 5, v, seed)
    expected = whole(**inputs)
    found = chunked_weighted_kl(chunk=chunk, **inputs)._asdict()
    assert set(found) == set(expected)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-12), name


def check_chunked_gradients(n, v, chunk, seed, outputs):
    inputs = random_inputs(n, 5, v, seed)
    g = torch.Generator().manual_seed(1)
    upstream = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in outputs}
    expected = gradients(whole, inputs, **upstream)
    found = gradients(lambda **x: chunked_weighted_kl(chunk=chunk, **x), inputs, **upstream)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(expected, found, strict=True))


@for_all(N, SIZES, CHUNKS, SEEDS)
def test_chunked_equals_whole(n, v, chunk, seed):
    check_chunked(n, v, chunk, seed)


@for_all(N, SIZES, CHUNKS, SEEDS, st.sampled_from(OUTPUTS))
def test_chunked_gradients_equal_autograds(n, v, chunk, seed, outputs):
    check_chunked_gradients(n, v, chunk, seed, outputs)


def test_more_tokens_than_a_chunk_has_logits():
    check_chunked(n=20, v=6, chunk=1, seed=0)
    check_chunked_gradients(n=20, v=6, chunk=1, seed=0, outputs=("kl", "logp"))


def test_chunked_with_probabilities_that_underflow():
    """Log-probabilities down to -1000, of which float32 keeps nothing: against float64."""
    inputs = random_inputs(dtype=torch.float32)
    inputs |= {name: (200 * inputs[name]).detach() for name in ("hidden_p", "hidden_q")}
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    logp = torch.log_softmax(exact["hidden_p"] @ exact["lm_head"].t() / 0.7, -1)
    assert (logp < -1000).any() and (logp.float().exp() == 0).any()
    expected, found = whole(**exact), chunked_weighted_kl(chunk=3, **inputs)._asdict()
    for name in expected:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-3), name
    for a, b in zip(
        gradients(whole, exact, kl=1, logp=1),
        gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1, logp=1),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("name", ["hidden_p", "lm_head"])
def test_only_what_needs_a_gradient_gets_one(name):
    inputs = random_inputs()
    inputs["hidden_p" if name == "lm_head" else "lm_head"].requires_grad_(False)
    (expected,) = gradients(whole, inputs, (name,), kl=1, logp=1)
    (found,) = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, (name,), kl=1, logp=1)
    assert (expected - found).abs().max() < 1e-10


def test_what_is_only_logged_has_no_gradient_and_the_reference_gets_none():
    inputs = random_inputs()
    inputs["hidden_q"].requires_grad_()
    inputs["lm_head_q"].requires_grad_()
    stats = chunked_weighted_kl(chunk=3, **inputs)
    assert [name for name, value in stats._asdict().items() if value.requires_grad] == ["kl", "logp", "entropy"]
    (stats.kl + stats.logp + stats.entropy).sum().backward()
    assert inputs["hidden_q"].grad is None and inputs["lm_head_q"].grad is None


def test_one_projection_for_both_gets_only_the_policys_gradient():
    inputs = random_inputs()
    del inputs["lm_head_q"]
    shared = {**inputs, "lm_head_q": inputs["lm_head"].detach()}
    expected = gradients(whole, shared, kl=1)
    found = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_without_a_reference():
    inputs = random_inputs()
    expected = whole(**inputs)
    found = chunked_weighted_kl(
        inputs["hidden_p"], None, inputs["lm_head"], None, 3, inputs["targets"], temperature=0.7
    )
    assert found.kl is found.ref_logp is found.kl_time is found.kl_text is None
    assert torch.allclose(found.logp, expected["logp"]) and torch.allclose(found.entropy, expected["entropy"])
    a = torch.autograd.grad(found.logp.sum(), inputs["lm_head"])[0]
    b = torch.autograd.grad(expected["logp"].sum(), inputs["lm_head"])[0]
    assert (a - b).abs().max() < 1e-10


def test_without_targets_and_time_tokens():
    inputs = random_inputs()
    expected = whole(**inputs)
    del inputs["targets"], inputs["time_tokens"]
    found = chunked_weighted_kl(chunk=3, **inputs)
    assert found.logp is found.ref_logp is None
    assert torch.allclose(found.kl, expected["kl"])
    assert torch.equal(found.kl_time, torch.zeros(7, dtype=torch.float64))
    assert torch.allclose(found.kl_text, expected["kl_time"] + expected["kl_text"])


def test_the_temperature_is_one_unless_given():
    inputs = random_inputs()
    expected = whole(**{**inputs, "temperature": 1.0})
    del inputs["temperature"]
    assert torch.allclose(chunked_weighted_kl(chunk=3, **inputs).kl, expected["kl"])


def test_split_adds_up_and_is_there_when_weights_are_zero():
    inputs = random_inputs()
    inputs["weights"] = torch.zeros(11)
    stats = chunked_weighted_kl(chunk=3, **inputs)
    assert torch.equal(stats.kl, torch.zeros(7, dtype=torch.float64))
    assert (stats.kl_time > 0).all() and (stats.kl_text > 0).all()
    inputs["weights"] = torch.ones(11)
    assert torch.allclose(chunked_weighted_kl(chunk=3, **inputs).kl, stats.kl_time + stats.kl_text)


def test_equal_policy_and_reference_have_exactly_zero_kl_and_gradient():
    inputs = random_inputs(dtype=torch.float32)
    inputs |= {"hidden_q": inputs["hidden_p"].detach(), "lm_head_q": inputs["lm_head"].detach()}
    stats = chunked_weighted_kl(chunk=3, **inputs)
    assert torch.equal(stats.kl, torch.zeros(7)) and torch.equal(stats.logp, stats.ref_logp)
    for gradient in gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_tokens():
    inputs = random_inputs(n=0)
    stats = chunked_weighted_kl(chunk=3, **inputs)
    assert all(value.shape == (0,) for value in stats)
    (stats.kl + stats.logp).sum().backward()
    assert inputs["lm_head"].grad.abs().sum() == 0


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_any_type_outside_float32_inside(dtype, error):
    """Values are those of the rounded inputs in float64: the logits themselves are not rounded to half precision."""
    inputs = random_inputs(dtype=dtype)
    exact = {
        name: value.detach().double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    expected = whole(**exact)
    stats = chunked_weighted_kl(chunk=3, **inputs)
    for name, value in stats._asdict().items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).abs().max() < error * 10, name
    found = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1, logp=1)
    for a, b in zip(gradients(whole, exact, kl=1, logp=1), found, strict=True):
        assert b.dtype == dtype
        assert torch.allclose(b.double(), a, rtol=2 * torch.finfo(dtype).eps, atol=error * float(a.abs().max()))


def test_half_precision_gradients_are_summed_in_float32():
    """Over 64 blocks of the vocabulary; only the sum is rounded."""
    inputs = random_inputs(n=64, v=512, dtype=torch.bfloat16)
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    (expected,) = gradients(whole, exact, ("hidden_p",), kl=1, logp=1)
    (found,) = gradients(lambda **x: chunked_weighted_kl(chunk=1, **x), inputs, ("hidden_p",), kl=1, logp=1)
    assert (found - expected).abs().max() < torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_half_precision_reference_beside_a_float32_policy():
    inputs = random_inputs(dtype=torch.float32)
    inputs |= {"hidden_q": inputs["hidden_q"].bfloat16(), "lm_head_q": inputs["lm_head_q"].bfloat16()}
    exact = {**inputs, "hidden_q": inputs["hidden_q"].float(), "lm_head_q": inputs["lm_head_q"].float()}
    a, b = chunked_weighted_kl(chunk=3, **inputs), chunked_weighted_kl(chunk=3, **exact)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_mixed_types_meet_in_the_wider_one():
    inputs = random_inputs()
    mixed = {**inputs, "lm_head": inputs["lm_head"].detach().float(), "hidden_q": inputs["hidden_q"].float()}
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in mixed.items()}
    assert torch.equal(chunked_weighted_kl(chunk=3, **mixed).kl, chunked_weighted_kl(chunk=3, **exact).kl)


def test_autocast_rounds_the_inputs_and_nothing_else():
    inputs = random_inputs(dtype=torch.float32)
    names = ("hidden_p", "hidden_q", "lm_head", "lm_head_q")
    rounded = {**inputs, **{name: inputs[name].detach().bfloat16() for name in names}}

    def under_autocast(**x):
        with torch.autocast("cpu", torch.bfloat16):
            return chunked_weighted_kl(chunk=3, **x)

    a, b = under_autocast(**inputs), chunked_weighted_kl(chunk=3, **rounded)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    found = gradients(under_autocast, inputs, kl=1, logp=1)
    expected = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), rounded, kl=1, logp=1)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y.float())
    with torch.autocast("cpu", torch.bfloat16):  # also when the backward pass itself runs under autocast
        again = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1, logp=1)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_a_tied_projection_collects_both_gradients():
    """The projection is also the embedding: its gradient is the sum of both uses."""
    inputs = random_inputs()
    ids = torch.tensor([0, 3, 3, 7, 1, 10, 2])

    def tied(function):
        embedding = inputs["lm_head"].detach().clone().requires_grad_()
        out = function(**{**inputs, "hidden_p": torch.tanh(embedding[ids]), "lm_head": embedding})
        out = out if isinstance(out, dict) else out._asdict()
        return torch.autograd.grad((out["kl"] - out["logp"]).sum(), embedding)[0]

    assert (tied(whole) - tied(lambda **x: chunked_weighted_kl(chunk=3, **x))).abs().max() < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_cuda(dtype):
    inputs = random_inputs(n=64, h=32, v=512, dtype=dtype)
    on_device = {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}
    doubled = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    run = partial(gradients, partial(chunked_weighted_kl, chunk=16), kl=1, logp=1)
    for on_cpu, found, exact in zip(run(inputs), run(on_device), run(doubled), strict=True):
        error = (on_cpu.double() - exact).abs().max()
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double().cpu() - exact).abs().max() < 4 * (error + rounding)
    for a, b in zip(chunked_weighted_kl(chunk=16, **inputs), chunked_weighted_kl(chunk=16, **on_device), strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-3)


# --- estimates from sampled tokens


def test_estimators_by_hand():
    p, q = torch.tensor([0.0, -1.0]), torch.tensor([-1.0, -1.0])
    assert k1(p, q).tolist() == [1, 0]
    assert k2(p, q).tolist() == [0.5, 0]
    assert k3(p, q).tolist() == pytest.approx([math.exp(-1), 0])
    assert float(k3(torch.tensor(-1.0), torch.tensor(0.0))) == pytest.approx(math.e - 2)


def test_k3_clamped_as_the_released_code_does():
    """log p - log q = -1000 (e^1000 is infinite), -20, -4, -1, 20: beyond the clamp the value stays, without slope."""
    p = torch.tensor([-1000.0, -20.0, -4.0, -1.0, 0.0], requires_grad=True)
    q = torch.tensor([0.0, 0.0, 0.0, 0.0, -20.0])
    values = k3(p, q, clamp=10)
    assert values.tolist() == pytest.approx([10, 10, 10, math.e - 2, 10])
    assert torch.autograd.grad(values.sum(), p)[0].tolist() == pytest.approx([0, 0, 0, 1 - math.e, 0])
    assert torch.equal(k3(p, q, clamp=0), k3(p, q))
    # Without a clamp too, a log ratio beyond 80 counts as 80: what float32 holds.
    assert k3(p, q).tolist() == pytest.approx([math.exp(80), math.exp(20) - 21, math.exp(4) - 5, math.e - 2, 19])
    assert torch.isfinite(torch.autograd.grad((0.0 * k3(p, q)).sum(), p)[0]).all()  # beta = 0: logged only
    assert k3(p, q, clamp=60).tolist() == pytest.approx([60, 60, math.exp(4) - 5, math.e - 2, 19])


@for_all(LOGITS, LOGITS)
def test_expected_values_and_gradients_of_the_estimators(p, q):
    """Expectations over the sampled token, exact over a small vocabulary; each estimator's documented gradient."""
    z = torch.tensor(p, dtype=torch.float64).div(10).requires_grad_()
    log_p, log_q = torch.log_softmax(z, -1), logp([x / 10 for x in q])
    kl_pq = subset_kl(log_p, log_q, torch.arange(V))
    kl_qp = (log_q.exp() * (log_q - log_p)).sum()
    probability = log_p.exp().detach()

    def gradient(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]

    def expectation(k):
        return (probability * k(log_p, log_q)).sum()

    assert torch.allclose(expectation(k1), kl_pq) and torch.allclose(expectation(k3), kl_pq)
    assert torch.allclose(gradient(expectation(k1)), torch.zeros(V, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gradient(expectation(k2)), gradient(kl_pq), atol=1e-12)
    assert torch.allclose(gradient(expectation(k3)), gradient(kl_qp), atol=1e-12)
    assert (k3(log_p, log_q) >= 0).all() and (k2(log_p, log_q) >= 0).all()


# --- time tokens


def test_time_tokens_of_the_real_tokenizer(capsys):
    ids = time_token_ids(QWEN)
    texts = {int(i): QWEN.decode([int(i)]) for i in ids}
    with capsys.disabled():
        print(f"\ntime tokens of the Qwen2.5 tokenizer: {texts}")
    assert list(range(15, 25)) == [i for i, text in texts.items() if text.strip().isdigit()]  # the ten digits
    assert sorted(set(text.strip() for text in texts.values())) == sorted([*"0123456789", *TIME_SEPARATORS])
    assert 220 not in texts  # the lone space
    spans = QWEN("<timestamp>12.5 to 30.0</timestamp><glue>[(20.3, 30.8)]</glue>").input_ids
    kept = "".join(QWEN.decode([i]) for i in spans if i in texts)
    assert kept == "12.530.020.3,30.8"


class Vocabulary:
    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in reversed(list(enumerate(self.tokens)))}


def test_no_time_tokens():
    assert time_token_ids(Vocabulary("a")).dtype == torch.long


def test_time_tokens_by_rule():
    vocabulary = Vocabulary(
        "7", "Ġ12", "▁3", "５", "²", "7a", "", "Ġ", ".", "Ġ-", "..", "),", "Ġto", "s", "<t5>", ":", ",", "8▁"
    )
    ids = time_token_ids(vocabulary)
    assert ids.dtype == torch.long
    assert ids.tolist() == [0, 1, 2, 8, 9, 15, 16, 17]
    assert time_token_ids(vocabulary, separators=("<t5>",)).tolist() == [0, 1, 2, 14, 17]
