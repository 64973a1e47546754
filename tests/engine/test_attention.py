"""Tests of attention over a tree of prompts and responses, against a dense mask and against the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.attention import (
    GroupCache,
    Stretch,
    Tree,
    TreeAttention,
    asked_of,
    attend,
    attend_backward,
    attend_backward_plainly,
    attend_plainly,
)

SCALE = 0.3


def random_row(tree: Tree, dtype: torch.dtype, seed: int = 0, heads: int = 4, key_heads: int = 2, d: int = 8):
    """q [heads, N, d], k and v [key heads, N, d], and a gradient for the output."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(tree.prompts) + sum(map(sum, tree.responses))
    shapes = (heads, key_heads, key_heads, heads)
    return [torch.randn(h, n, d, generator=rng, dtype=torch.float64).to(dtype) for h in shapes]


def tree_mask(tree: Tree) -> torch.Tensor:
    """Who sees whom, written down token by token: bool [N, N]."""
    owner = [(b, None) for b, n in enumerate(tree.prompts) for _ in range(n)]
    owner += [(b, g) for b, row in enumerate(tree.responses) for g, n in enumerate(row) for _ in range(n)]
    n = len(owner)
    return torch.tensor([[j <= i and owner[j] in {owner[i], (owner[i][0], None)} for j in range(n)] for i in range(n)])


def dense(q, k, v, tree):
    """Attention with that mask."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~tree_mask(tree), -torch.inf)
    return scores.softmax(-1) @ v


def with_gradients(function, row, tree):
    q, k, v, grad = row
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, tree)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


lengths = st.integers(1, 9)
trees = st.lists(st.tuples(lengths, st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=3).map(
    lambda groups: Tree(tuple(p for p, _ in groups), tuple(tuple(r) for _, r in groups))
)


@settings(max_examples=60, deadline=None)
@given(trees, st.integers(0, 1000))
def test_equals_a_dense_mask(tree, seed):
    row = random_row(tree, torch.float64, seed)
    ours = with_gradients(lambda q, k, v, tree: TreeAttention.apply(q, k, v, tree, SCALE), row, tree)
    for x, y in zip(ours, with_gradients(dense, row, tree), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_dense_mask_in_lower_precision(dtype):
    tree = Tree((40, 70), ((20, 3, 31), (8, 8)))
    row = random_row(tree, dtype)
    exact = with_gradients(dense, [x.double() for x in row], tree)
    ours = with_gradients(lambda q, k, v, tree: TreeAttention.apply(q, k, v, tree, SCALE), row, tree)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, atol=bound, rtol=bound)


class Handed(TorchDispatchMode):
    """Whether each log-sum-exp that a backward kernel got was dense in memory."""

    def __init__(self):
        super().__init__()
        self.dense = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.dense.append(args[5].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_kernels_get_a_dense_log_sum_exp():
    """CUDA's takes it for dense without looking at its strides."""
    tree = Tree((9, 5), ((4, 2), (3, 3)))
    with Handed() as handed:
        with_gradients(lambda *x: TreeAttention.apply(*x, SCALE), random_row(tree, torch.float32), tree)
    assert handed.dense == [True] * 5


def test_indices_are_copied_to_a_device_once():
    tree = Tree((9,), ((4, 2),))
    for name in ("slots", "asked"):
        assert tree.on(torch.device("cpu"), name) is tree.on(torch.device("cpu"), name)
    assert tree == Tree((9,), ((4, 2),)) and hash(tree) == hash(Tree((9,), ((4, 2),)))


@settings(max_examples=40, deadline=None)
@given(trees, st.integers(0, 1000))
def test_what_is_asked_for_is_a_part_of_the_whole_row(tree, seed):
    """With the gradients: those that are not asked for have queries without any."""
    q, k, v, grad = random_row(tree, torch.float64, seed)
    last = torch.tensor(tree.prompts).cumsum(0) - 1
    assert tree.asked.tolist() == [*last.tolist(), *range(sum(tree.prompts), q.shape[1])]
    part = with_gradients(
        lambda q, k, v, tree: TreeAttention.apply(q, k, v, tree, SCALE),
        (q[:, tree.asked], k, v, grad[:, tree.asked]),
        tree,
    )
    asked = torch.zeros_like(grad)
    asked[:, tree.asked] = grad[:, tree.asked]
    out, dq, dk, dv = with_gradients(dense, (q, k, v, asked), tree)
    for x, y in zip(part, (out[:, tree.asked], dq[:, tree.asked], dk, dv), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_prompts_alone_are_causal():
    tree = Tree((5, 3))
    row = random_row(tree, torch.float64)
    ours = TreeAttention.apply(*row[:3], tree, SCALE)
    torch.testing.assert_close(ours, dense(*row[:3], Tree((5, 3), ((), ()))), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_the_kernels_are_the_definitions(causal, length, keys, seed):
    """Also where out and lse are about more keys than these, as in a tree."""
    keys = length if causal else keys
    rng = torch.Generator().manual_seed(seed)
    q, grad = (torch.randn(2, 4, length, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, keys, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    for x, y in zip(attend(q, k, v, causal, SCALE), attend_plainly(q, k, v, causal, SCALE), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)
    out, lse = attend(q, k, v, causal, SCALE)
    more = (torch.randn(out.shape, generator=rng, dtype=torch.float64) + out, lse + 0.7)
    for joint in ((out, lse), more):
        kernel = attend_backward(grad, q, k, v, *joint, causal, SCALE)
        plain = attend_backward_plainly(grad, q, k, v, *joint, causal, SCALE)
        for x, y in zip(kernel, plain, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.fixture
def by_stem(monkeypatch):
    """Decoding attends to each stem by itself, as on a GPU in half precision; the number of stems of each call."""
    stems = []

    def spy(*arguments):
        stems.append(arguments[1].shape)
        return attend(*arguments)

    monkeypatch.setattr("engine.attention._flash", lambda q: True)
    monkeypatch.setattr("engine.attention.FLASH_STEM", 0)
    monkeypatch.setattr("engine.attention.attend", spy)
    return stems


@pytest.mark.parametrize("prompts", [(7, 4, 6), (5, 5, 5)])
def test_stem_by_stem_is_the_same_as_all_at_once(prompts, by_stem):
    test_token_by_token_is_the_same_as_all_at_once(prompts)
    stems = [(1, 2, n, 8) for n in prompts]
    assert by_stem == 2 * stems + 3 * [stems[0], stems[2]]  # without their padding, and without the one that has left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_by_stem_is_as_exact_as_one_softmax(dtype, by_stem):
    """Scores up to 60, the last slots unseen: against the same in float64."""
    q, k, v = (x[:, :46] for x in random_row(Tree((46,)), dtype, heads=4, key_heads=2, d=8)[:3])
    q = 6 * q
    found = {}
    for name, kind in (("apart", dtype), ("exact", torch.float64)):
        cache = GroupCache(Tree((30, 12)), 2, 8)
        cache.prefill(0, *(x[:, :42].to(kind) for x in (k, v)))
        cache.place(torch.zeros(2, 2, dtype=torch.long), 4)
        found[name] = cache.attend(0, *(x[:, 42:].to(kind) for x in (q, k, v)), SCALE)
    assert len(by_stem) == 4 and found["apart"].dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found["apart"].double(), found["exact"], atol=bound, rtol=0)


@pytest.mark.parametrize("prompts", [(7, 4, 6), (5, 5, 5)])
def test_token_by_token_is_the_same_as_all_at_once(prompts):
    """Three prompts with two responses of five tokens; along the way some of them are dropped."""
    tree = Tree(prompts, ((5, 5),) * 3)
    q, k, v, _ = random_row(tree, torch.float64)
    whole = dense(q, k, v, tree)
    n_prompt = sum(prompts)
    cache = GroupCache(Tree(prompts), 2, 5)
    cache.prefill(0, k[:, :n_prompt], v[:, :n_prompt])
    rows = torch.arange(6).view(3, 2)
    for t in range(5):
        if t == 2:  # the second prompt ends; of the others, one response each
            kept, left = torch.tensor([0, 2]), torch.tensor([[1], [0]])
            cache.keep(kept, left)
            rows = rows[kept].gather(1, left)
        here = n_prompt + rows.flatten() * 5 + t
        cache.place(torch.full_like(rows, t), t + 1)
        out = cache.attend(0, q[:, here], k[:, here], v[:, here], SCALE)
        torch.testing.assert_close(out, whole[:, here], atol=1e-12, rtol=0)
    assert rows.tolist() == [[1], [4]]


def test_stretches_of_tokens_are_the_same_as_all_at_once():
    """Two of six responses get two tokens together, in a cache that has grown, among others that are dropped."""
    prompts = (7, 4, 6)
    tree = Tree(prompts, ((5, 5),) * 3)
    q, k, v, _ = random_row(tree, torch.float64)
    whole = dense(q, k, v, tree)
    cache = GroupCache(Tree(prompts), 2, 2)
    cache.prefill(0, k[:, :17], v[:, :17])
    rows = torch.arange(6).view(3, 2)
    for t in range(2):
        here = 17 + rows.flatten() * 5 + t
        cache.place(torch.full_like(rows, t), t + 1)
        cache.attend(0, q[:, here], k[:, here], v[:, here], SCALE)
    cache.keep(torch.tensor([0, 2]), torch.tensor([[1], [0]]))
    cache.reserve(5)
    here = torch.tensor([17 + row * 5 + t for row in (4, 1) for t in (2, 3)])
    stretches = [Stretch(1, 0, 6, 2, 2), Stretch(0, 0, 7, 2, 2)]
    out = cache.extend(0, q[:, here], k[:, here], v[:, here], stretches, SCALE)
    torch.testing.assert_close(out, whole[:, here], atol=1e-12, rtol=0)
    ends = here[asked_of(stretches, here.device)]
    assert ends.tolist() == here[1::2].tolist()
    out = cache.extend(0, q[:, ends], k[:, here], v[:, here], stretches, SCALE)  # the same again, of the last tokens
    torch.testing.assert_close(out, whole[:, ends], atol=1e-12, rtol=0)
    here = torch.tensor([17 + row * 5 + 4 for row in (1, 4)])
    cache.place(torch.tensor([[4], [4]]), 5)
    out = cache.attend(0, q[:, here], k[:, here], v[:, here], SCALE)
    torch.testing.assert_close(out, whole[:, here], atol=1e-12, rtol=0)
