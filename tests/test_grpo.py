"""The objective against a loop-written reference, REINFORCE, hand-computed clipping, and every way to split a batch."""

import math
from functools import cache
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import strategies as st
from properties import for_all

from grpo import NORMALISE, grpo_loss, loss_count

CLIPS = [(None, None), (0.2, 0.2), (0.2, 0.27), (0.2, 0.28), (None, 0.2), (0.2, None)]
MAX_TOKENS = 10
KINDS, SEEDS = st.sampled_from(NORMALISE), st.integers(0, 2**32 - 1)
ORDERS = list(permutations(range(6)))
STATS = ("tokens", "ratio", "clipped_low", "clipped_high", "approx_kl", "penalty", "advantage")


def mean_stats(stats: dict[str, torch.Tensor]) -> dict[str, float]:
    """Averages over real tokens from the (added up) sums of `grpo_loss`; "tokens" stays the number of tokens."""
    tokens = float(stats["tokens"])
    return {name: float(value) if name == "tokens" else float(value) / max(tokens, 1) for name, value in stats.items()}


def random_batch(n=6, t=5, seed=0, spread=0.3):
    """[N, T] tensors in float64 with ratios around the clipping range; row 0 is full, the last row is empty."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, t, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, t + 1, (n,), generator=g)
    lengths[0], lengths[-1] = t, 0
    old = normal() - 2
    batch = {
        "logp": old + spread * normal(),
        "old_logp": old,
        "advantages": normal(),
        "mask": torch.arange(t) < lengths[:, None],
        "kl": 0.1 * normal().abs(),
    }
    return batch


def slow_loss(logp, old_logp, advantages, mask, kl, clip_low, clip_high, normalise):
    """The three objectives, token by token in Python's numbers, and their derivatives for logp and kl [N, T]."""
    rows = [x.tolist() for x in (logp, old_logp, advantages, mask, torch.zeros_like(logp) if kl is None else kl)]
    low = 0.0 if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    lengths = [sum(row) for row in rows[3]]
    count = {"sequence": sum(map(bool, lengths)), "token": sum(lengths)}
    count["fixed"] = count["sequence"] * MAX_TOKENS
    loss, slopes, penalties = 0.0, *([[0.0] * len(row) for row in rows[0]] for _ in range(2))
    for i, length in enumerate(lengths):
        share = 1 / (count[normalise] * (length if normalise == "sequence" else 1)) if length else 0.0
        for t, (new, old, advantage, real, penalty) in enumerate(zip(*(x[i] for x in rows), strict=True)):
            if real:
                ratio = math.exp(new - old)
                free, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
                loss += share * (penalty - min(free, clipped))
                slopes[i][t] = -share * free if free <= clipped else 0.0  # d ratio / d log p = ratio
                penalties[i][t] = share
    return loss, *(torch.tensor(rows, dtype=torch.float64) for rows in (slopes, penalties))


def everything(batch, normalise="sequence", clips=(0.2, 0.28), **options):
    """Loss, statistics, and the gradients of the loss under the names of what they are for: logp and kl."""
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in ("logp", "kl")}
    options |= {"clip_low": clips[0], "clip_high": clips[1], "normalise": normalise, "max_tokens": MAX_TOKENS}
    loss, stats = grpo_loss(**{**batch, **leaves}, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True)), **stats}


@cache
def everything_at_once(normalise):
    return everything(random_batch(), normalise)


@for_all(KINDS, st.sampled_from(CLIPS), st.integers(2, 6), st.integers(1, 5), SEEDS)
def test_against_the_slow_reference(normalise, clips, n, t, seed):
    batch = random_batch(n, t, seed)
    found = everything(batch, normalise, clips)
    expected = slow_loss(**batch, clip_low=clips[0], clip_high=clips[1], normalise=normalise)
    for name, value in zip(("loss", "logp", "kl"), expected, strict=True):
        assert (found[name] - value).abs().max() < 1e-12


@pytest.mark.parametrize("normalise", NORMALISE)
def test_without_penalty(normalise):
    batch = {**random_batch(), "kl": None}
    found, stats = grpo_loss(**batch, clip_low=0.2, clip_high=0.2, normalise=normalise, max_tokens=MAX_TOKENS)
    assert found == pytest.approx(slow_loss(**batch, clip_low=0.2, clip_high=0.2, normalise=normalise)[0])
    assert stats["penalty"] == 0


@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_bonus_is_gained_as_a_penalty_is_paid(normalise):
    batch = random_batch()
    options = {"clip_low": 0.2, "clip_high": 0.2, "normalise": normalise, "max_tokens": MAX_TOKENS}
    bonus = torch.rand(batch["logp"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, stats = grpo_loss(**batch, **options, bonus=bonus)
    paid = {**batch, "kl": batch["kl"] - bonus}
    expected, *_ = slow_loss(**paid, clip_low=0.2, clip_high=0.2, normalise=normalise)
    assert float(found) == pytest.approx(expected)
    assert stats["penalty"] == grpo_loss(**batch, **options)[1]["penalty"]
    bonus[~batch["mask"]] = torch.nan
    assert float(grpo_loss(**batch, **options, bonus=bonus)[0]) == float(found)


# --- Eq. 2


@for_all(st.sampled_from(CLIPS), SEEDS)
def test_at_ratio_one_the_gradient_is_reinforce_with_advantages(clips, seed):
    batch = random_batch(seed=seed)
    batch["old_logp"] = batch["logp"].clone()
    gradient = everything(batch, clips=clips)["logp"]
    lengths = batch["mask"].sum(-1, keepdim=True).clamp(min=1)
    reinforce = -(batch["advantages"] * batch["mask"] / lengths) / 5  # 5 of the 6 sequences have tokens
    assert torch.allclose(gradient, reinforce, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.2, 2.0, 2.4, 2.4),
        (1.5, 2.0, 2.56, 0.0),  # rewarded enough: clipped at 1.28
        (0.5, 2.0, 1.0, 1.0),  # min keeps the pessimistic side: no clip
        (1.0, -2.0, -2.0, -2.0),
        (0.9, -2.0, -1.8, -1.8),
        (0.5, -2.0, -1.6, 0.0),  # punished enough: clipped at 0.8
        (0.01, -2.0, -1.6, 0.0),
        (1.5, -2.0, -3.0, -3.0),  # gone up although bad: no clip
        (100.0, 2.0, 2.56, 0.0),
        (3.0, 0.0, 0.0, 0.0),
        (0.3, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand_for_both_signs(ratio, advantage, gain, slope):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = grpo_loss(logp, zero, zero + advantage, one, None, 0.2, 0.28, "sequence")
    loss.backward()
    assert loss.item() == pytest.approx(-gain)
    assert float(logp.grad) == pytest.approx(-slope)  # d gain / d log p = ratio A where it is not clipped
    clipped = slope == 0 and advantage != 0
    assert float(stats["clipped_high"]) == (clipped and advantage > 0)
    assert float(stats["clipped_low"]) == (clipped and advantage < 0)
    assert mean_stats(stats)["ratio"] == pytest.approx(ratio)
    unclipped, _ = grpo_loss(logp, zero, zero + advantage, one, None, None, None, "sequence")
    assert unclipped.item() == pytest.approx(-ratio * advantage)


def test_normalisations_by_hand():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([[6.0, 0, 0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)

    def loss(normalise):
        return float(grpo_loss(zero, zero, advantages, mask, None, 0.2, 0.2, normalise, max_tokens=4)[0])

    assert loss("sequence") == pytest.approx(-(6 + 2) / 2)
    assert loss("token") == pytest.approx(-12 / 4)
    assert loss("fixed") == pytest.approx(-12 / (2 * 4))
    penalised = grpo_loss(zero, zero, advantages, mask, zero + 0.5, 0.2, 0.2, "sequence")[0]
    assert float(penalised) == pytest.approx(-4 + 0.5)


def test_counts():
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    assert [int(loss_count(mask, normalise, max_tokens=4)) for normalise in NORMALISE] == [2, 4, 8]
    with pytest.raises(ValueError, match="unknown normalisation 'mean': choose one of sequence, token, fixed"):
        loss_count(mask, "mean")
    with pytest.raises(ValueError, match=r'^normalise="fixed" needs max_tokens, the length limit of a response$'):
        loss_count(mask, "fixed")


# --- what must not matter


@for_all(KINDS, st.sampled_from(CLIPS), SEEDS)
def test_masked_tokens_have_exactly_no_influence(normalise, clips, seed):
    batch = random_batch(seed=seed)
    expected = everything(batch, normalise, clips)
    for value in (math.nan, math.inf, 1e300):
        for name in ("logp", "old_logp", "advantages", "kl"):
            batch[name] = batch[name].masked_fill(~batch["mask"], value)
        found = everything(batch, normalise, clips)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all((found[name][~batch["mask"]] == 0).all() for name in ("logp", "kl"))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", range(4))
@pytest.mark.parametrize("columns", range(1, 5))
def test_padding_does_not_matter(columns, rows, left):
    batch = random_batch()
    n, t = batch["mask"].shape
    padded = {}
    for name, value in batch.items():
        padded[name] = torch.zeros(n + rows, t + columns, dtype=value.dtype)
        padded[name][:n, columns if left else 0 : t + columns if left else t] = value
    for normalise in NORMALISE:
        expected, found = everything_at_once(normalise), everything(padded, normalise)
        assert found["loss"] == pytest.approx(float(expected["loss"]))
        for name in ("logp", "kl"):
            assert torch.allclose(found[name][padded["mask"]], expected[name][batch["mask"]], atol=1e-14)


@for_all(st.integers(0, 719), st.integers(0, 31))
def test_micro_batches_processes_and_order_do_not_matter(order, cuts):
    """Split a shuffled batch anywhere: with the summed count, losses, gradients and statistics add up to the whole."""
    batch = random_batch()
    order = list(ORDERS[order])
    parts = [order[a:b] for a, b in pairwise([0, *(k for k in range(1, 6) if cuts >> (k - 1) & 1), 6])]
    pieces = [{name: value[rows] for name, value in batch.items()} for rows in parts]
    for normalise in NORMALISE:
        expected = everything_at_once(normalise)
        count = sum(loss_count(piece["mask"], normalise, MAX_TOKENS) for piece in pieces)
        found = [everything(piece, normalise, count=count) for piece in pieces]
        for name in ("logp", "kl"):
            joined = torch.cat([part[name] for part in found])
            assert torch.allclose(joined, expected[name][order], atol=1e-14)
        for name in ("loss", *STATS):
            total = float(sum(part[name] for part in found))
            assert total == pytest.approx(float(expected[name]), abs=1e-12)


def test_local_means_of_unequal_micro_batches_would_be_wrong():
    """Why the count is an argument: averaging the parts' own means is another objective."""
    batch = random_batch()
    whole, _ = grpo_loss(**batch, clip_low=0.2, clip_high=0.2, normalise="token")
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
    means = [grpo_loss(**part, clip_low=0.2, clip_high=0.2, normalise="token")[0] for part in parts]
    assert abs(float(whole) - float(sum(means)) / 2) > 0.001


# --- statistics


def test_statistics_are_means_over_real_tokens():
    batch = random_batch(spread=0.5)
    _, sums = grpo_loss(**batch, clip_low=0.2, clip_high=0.28, normalise="sequence")
    assert tuple(sums) == STATS
    real = batch["mask"]
    log_ratio, a = (batch["logp"] - batch["old_logp"])[real], batch["advantages"][real]
    ratio = log_ratio.exp()
    low, high = (ratio < 0.8) & (a < 0), (ratio > 1.28) & (a > 0)
    assert low.any() and high.any()
    assert all(type(value) is float for value in mean_stats(sums).values())
    assert mean_stats(sums) == pytest.approx(
        {
            "tokens": int(real.sum()),
            "ratio": float(ratio.mean()),
            "clipped_low": float(low.double().mean()),
            "clipped_high": float(high.double().mean()),
            "approx_kl": float((ratio - 1 - log_ratio).mean()),
            "penalty": float(batch["kl"][real].mean()),
            "advantage": float(a.mean()),
        }
    )


def test_statistics_carry_no_gradient_and_nothing_is_clipped_without_clip():
    batch = random_batch(spread=0.5)
    batch["logp"].requires_grad_()
    _, stats = grpo_loss(**batch, clip_low=None, clip_high=None, normalise="sequence")
    assert not any(value.requires_grad for value in stats.values())
    assert stats["clipped_low"] == stats["clipped_high"] == 0


@pytest.mark.parametrize("advantage", [0.0, 2.0, -2.0])
@pytest.mark.parametrize("clips", [(0.2, 0.28), (None, None)])
def test_a_log_ratio_too_large_for_float32_gives_no_nan(advantage, clips):
    """A token beside it, at ratio 1, keeps its gradient."""
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-101.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = grpo_loss(logp, old, torch.full((1, 2), advantage), mask, None, *clips, "token")
    loss.backward()
    assert math.isfinite(loss.item()) and all(math.isfinite(float(value)) for value in stats.values())
    assert torch.isfinite(logp.grad).all() and float(logp.grad[0, 1]) == pytest.approx(-advantage / 2)


def test_a_ratio_on_the_border_is_not_clipped():
    zero, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    _, stats = grpo_loss(zero, zero, torch.tensor([[1.0], [-1.0]]), mask, None, 0.0, 0.0, "token")
    assert stats["clipped_low"] == stats["clipped_high"] == 0


def test_sums_are_kept_in_float64():
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    loss, stats = grpo_loss(zero, zero, zero, mask, None, None, None, "token")
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float64 for value in stats.values())


def test_no_tokens_at_all():
    batch = random_batch()
    batch["mask"] = torch.zeros_like(batch["mask"])
    for count in (None, 0, torch.tensor(0), 5):
        loss, stats = grpo_loss(**batch, clip_low=0.2, clip_high=0.2, normalise="sequence", count=count)
        assert float(loss) == 0
    assert mean_stats(stats) == dict.fromkeys(STATS, 0.0)


def test_a_mask_of_zeros_and_ones_is_read_as_one():
    batch = random_batch()
    expected = everything(batch)
    found = everything({**batch, "mask": batch["mask"].double()})
    assert all(torch.equal(found[name], expected[name]) for name in expected)
