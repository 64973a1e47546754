"""Checks of what has a branch for CUDA, against float64 or the CPU: the sections *kernels*, *policy* and *training* of
`benchmarks/gpu.py`, which says what their bounds are, and how all sections report.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, distributed

import kl
import policy
from benchmarks import engine
from benchmarks.engine import Naive, Ours, make_problem, row
from benchmarks.kl import materialised
from benchmarks.sharded import sharded
from engine import attention, qwen2_5_vl, sampling, sharding
from engine.attention import GroupCache, Stretch, Tree, TreeAttention

HALF, SINGLE = torch.bfloat16, torch.float32
HEADS = [(28, 4, 128), (7, 1, 64), (4, 2, 32)]  # heads, key heads, size: of 7B, 20m and tiny
VISION = (4, 5)  # ids that are never sampled
SUSPECT, FAILED = "suspect:", "FAILED"


class Setting:
    """Where it runs, and how large."""

    def __init__(self, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.cuda = not dry

    def __call__(self, full: int, small: int) -> int:
        return small if self.dry else full

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def head(*names: str) -> None:
    say("", row(names), "|" + "---|" * len(names))


def suspect(name: str, verdict: str) -> None:
    """For the table of suspects, which `main` makes of these."""
    say(f"{SUSPECT} {name} | {verdict}")


def checks(jobs: Sequence[tuple[Callable, tuple]]) -> None:
    """A table of what these functions check; what they raise is shown below it."""
    head("check", "error", "bound", "")
    failures = []
    for job, arguments in jobs:
        try:
            job(*arguments)
        except Exception as error:
            failures.append(f"{job.__name__}{arguments[1:]}\n{traceback.format_exc()}")
            say(row([f"{job.__name__} {arguments[1:]}", type(error).__name__, "", FAILED]))
            print(failures[-1], file=sys.stderr, flush=True)
    for failure in failures:
        say("", "```", failure, "```")


def parts(jobs: Sequence[tuple[Callable, tuple]]) -> None:
    """Parts of a section that say what they find; one that raises does not end the others."""
    for job, arguments in jobs:
        try:
            job(*arguments)
        except Exception:
            say("", f"{job.__name__} {FAILED}", "", "```", traceback.format_exc(), "```")


def check(name: str, error: float, bound: float) -> None:
    say(row([name, f"{error:.1e}", f"{bound:.1e}", "ok" if error <= bound else FAILED]))


def distance(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|."""
    exact = exact.detach().double().cpu()
    return float((x.detach().double().cpu() - exact).norm() / exact.norm())


def compare(name: str, ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], parts: str) -> None:
    """One check per part of a result."""
    for part, x, y, z in zip(parts.split(), ours, plain, exact, strict=True):
        floor = 1e-6 if x.dtype == SINGLE else 1e-12 if x.dtype == torch.float64 else 0.0
        check(f"{name}: {part}", distance(x, z), 2 * distance(y, z) + floor)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------- kernels


def tree_mask(tree: Tree, device: str = "cpu") -> Tensor:
    """Who sees whom: bool [N, N]."""
    lengths = [*tree.prompts, *(n for responses in tree.responses for n in responses)]
    prompt = [*range(len(tree.prompts)), *(b for b, responses in enumerate(tree.responses) for _ in responses)]
    response = [0] * len(tree.prompts) + list(range(1, 1 + len(lengths) - len(tree.prompts)))
    b, g = (torch.tensor(x).repeat_interleave(torch.tensor(lengths)).to(device) for x in (prompt, response))
    mine = (b[:, None] == b) & ((g == 0) | (g[:, None] == g))
    return mine.tril()


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention as anybody would write it, in the type of its inputs."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def gradients(function: Callable, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The function's value, and the gradients of (value * grad).sum() for its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def random_row(tree: Tree, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and a gradient; scaled scores have a deviation of 3."""
    n = sum(tree.prompts) + sum(map(sum, tree.responses))
    q, keys, d = heads
    found = [normal(h, n, d, seed=i, scale=3.0 if i == 0 else 1.0) for i, h in enumerate((q, keys, keys, q))]
    return [x.to(device, dtype) for x in found]


TREE = Tree((193, 64, 310), ((37, 5, 64), (1, 80, 12), (0, 16, 3)))


def tree_attention(at: Setting, heads: tuple[int, int, int], dtype: torch.dtype, tree: Tree = TREE) -> None:
    """Forward and backward, of the whole row and of what is asked for alone; a long row is compared on the device, in
    float64 there.
    """
    long = tree is not TREE
    *inputs, grad = random_row(tree, heads, dtype, at.device)
    mask, scale = tree_mask(tree, at.device), heads[2] ** -0.5
    where = at.device if long else "cpu"
    name = f"attention, {heads[0]}/{heads[1]} heads of {heads[2]}, {str(dtype)[6:]}" + ", long" * long
    for what, asked in (("", slice(None)), (", asked for", tree.asked)):

        def naive(q: Tensor, k: Tensor, v: Tensor, asked=asked) -> Tensor:
            return dense(q, k, v, mask.to(q.device))[:, asked]

        def fast(q: Tensor, k: Tensor, v: Tensor, asked=asked) -> Tensor:
            return TreeAttention.apply(q[:, asked], k, v, tree, scale)

        exact = gradients(naive, [x.to(where).double() for x in inputs], grad[:, asked])
        plain, ours = (gradients(function, inputs, grad[:, asked]) for function in (naive, fast))
        compare(name + what, ours, plain, exact, "out dq dk dv")


@contextlib.contextmanager
def stems_apart(at: Setting, apart: bool) -> Iterator[None]:
    """In decoding, half precision attends to each stem by itself, however short it is, or to all in one softmax."""
    as_on_a_gpu = contextlib.nullcontext() if at.cuda else mock.patch.object(attention, "_flash", lambda q: apart)
    with mock.patch.object(attention, "FLASH_STEM", 0 if apart else float("inf")), as_on_a_gpu:
        yield


def cached_attention(at: Setting, heads: tuple[int, int, int], dtype: torch.dtype, apart: bool = False) -> None:
    """Token by token in a padded cache, rows that leave, then many tokens at once."""
    with stems_apart(at, apart):
        _cached_attention(at, heads, dtype, ", stems apart" * apart)


def _cached_attention(at: Setting, heads: tuple[int, int, int], dtype: torch.dtype, how: str) -> None:
    prompts, group, steps, more = (193, 64, 310), 4, 6, 5
    tree = Tree(prompts, ((steps + more,) * group,) * 3)
    q, k, v, _ = random_row(tree, heads, dtype, at.device)
    exact = dense(q.double().cpu(), k.double().cpu(), v.double().cpu(), tree_mask(tree))
    plain = dense(q, k, v, tree_mask(tree, at.device))
    n, scale = sum(prompts), heads[2] ** -0.5
    cache = GroupCache(Tree(prompts), group, 8)
    cache.prefill(0, k[:, :n], v[:, :n])
    rows = torch.arange(3 * group).view(3, group)
    found: list[list[Tensor]] = [[], [], []]

    def keep(out: Tensor, here: Tensor) -> None:
        for kept, x in zip(found, (out.cpu(), plain[:, here.to(at.device)].cpu(), exact[:, here]), strict=True):
            kept.append(x.flatten())

    for t in range(steps):
        if t == 3:
            kept, left = torch.tensor([0, 2]), torch.tensor([[1, 3], [0, 2]])
            cache.keep(kept, left)
            rows = rows[kept].gather(1, left)
        here = n + rows.flatten() * (steps + more) + t
        cache.place(torch.full_like(rows, t).to(at.device), 8)
        keep(cache.attend(0, *(x[:, here.to(at.device)] for x in (q, k, v)), scale), here)
    name = f"cached attention{how}, {heads[0]}/{heads[1]} heads of {heads[2]}, {str(dtype)[6:]}"
    compare(name, *([torch.cat(x)] for x in found), "steps")
    found = [[], [], []]
    cache.reserve(steps + more)
    here = torch.cat([n + rows[b, g] * (steps + more) + steps + torch.arange(more) for b, g in ((0, 1), (1, 0))])
    stretches = [Stretch(0, 1, prompts[0], steps, more), Stretch(1, 0, prompts[2], steps, more)]
    keep(cache.extend(0, *(x[:, here.to(at.device)] for x in (q, k, v)), stretches, scale), here)
    compare(name, *([torch.cat(x)] for x in found), "extend")


def chunked_kl(at: Setting, dtype: torch.dtype) -> None:
    """Values and gradients from hidden states, against whole logits."""
    n, hidden, vocabulary = 300, 896, at(20_000, 2000)
    p, lm_head = normal(n, hidden, seed=0), normal(vocabulary, hidden, seed=1, scale=3 * hidden**-0.5)
    q = p + normal(n, hidden, seed=2, scale=0.1)
    p, q, lm_head = (x.to(at.device, dtype) for x in (p, q, lm_head))
    weights = torch.full((vocabulary,), 0.04)
    weights[15:25] = 0
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(3))

    def run(function: Callable, dtype: torch.dtype, device: str) -> list[Tensor]:
        states, projection = (x.detach().to(device, dtype).requires_grad_() for x in (p, lm_head))
        ours = function is kl.chunked_weighted_kl
        w, ids, reference = weights.to(device), targets.to(device), q.to(device, dtype)
        if ours:
            stats = function(states, reference, projection, w, 128, ids)
            found = [stats.kl, stats.logp, stats.ref_logp, stats.entropy]
        else:
            found = list(function(states, reference, projection, w, ids, projection.detach()))
        (found[0] - found[1] / 10).sum().backward()
        return [*found, states.grad, projection.grad]

    exact = run(kl.chunked_weighted_kl, torch.float64, "cpu")
    plain = run(materialised, dtype, at.device)
    ours = run(kl.chunked_weighted_kl, dtype, at.device)
    compare(f"KL, {str(dtype)[6:]}", ours, plain, exact, "kl logp ref_logp entropy dhidden dprojection")


def sampler(at: Setting) -> None:
    """The same tokens as in float64 on the CPU, except where the draw lies on a border between two tokens."""
    rows, hidden, vocabulary = 64, 896, at(152_064, 5000)
    states, lm_head = normal(rows, hidden, seed=0).to(HALF), normal(vocabulary, hidden, seed=1, scale=0.1).to(HALF)
    exact = states.double() @ lm_head.double().t()
    on = [x.to(at.device) for x in (states, lm_head)]
    ours, old = kl.logits(*on), (on[0] @ on[1].t()).float()
    check("logits of half-precision states, largest difference", float((ours.cpu() - exact).abs().max()), 1e-4)
    log = [x.cpu().double().log_softmax(-1) for x in (ours, old, exact)]
    errors = [float((x - log[2]).abs().max()) for x in log[:2]]
    suspect("logits rounded to bfloat16", f"log-probabilities off by {errors[1]:.3f}, now by {errors[0]:.1e}")
    logits = ours.cpu()
    banned, uniform = torch.tensor([3, 7]), torch.rand(rows, generator=torch.Generator().manual_seed(2)).double()
    for temperature in (1.0, 0.7):
        chosen = sampling.choose_tokens(ours, uniform.to(at.device), temperature, banned.to(at.device)).cpu()
        p = logits.double().index_fill(-1, banned, -torch.inf).div(temperature).softmax(-1).cumsum(-1)
        target = (uniform * p[:, -1])[:, None]
        expected = torch.searchsorted(p, target, right=True)[:, 0]
        tie = (p.gather(1, torch.minimum(chosen, expected)[:, None]) - target).abs()[:, 0] < 1e-5
        check(f"sampled tokens at temperature {temperature}, wrong ones", int(((chosen != expected) & ~tie).sum()), 0)
    greedy = sampling.choose_tokens(ours, None, 1.0, banned.to(at.device)).cpu()
    best = logits.index_fill(-1, banned, -torch.inf)
    check("greedy tokens, wrong ones", int((best.gather(1, greedy[:, None])[:, 0] != best.amax(-1)).sum()), 0)


def score_rounding(at: Setting) -> None:
    """Probabilities over cached keys from scores in float32, and from scores rounded to bfloat16 as they once were."""
    q, k = normal(64, 128, seed=0, scale=3.0).to(at.device, HALF), normal(4096, 128, seed=1).to(at.device, HALF)
    exact = q.double() @ k.double().t()
    ours = attention._product(q[None], k.t()[None])[0]
    check("scores of cached attention, largest difference", float((ours - exact).abs().max()), 1e-3)
    old = float(((q @ k.t()).float() - exact).abs().max()) * 128**-0.5
    now = float((ours - exact).abs().max()) * 128**-0.5
    suspect("scores rounded to bfloat16", f"scaled scores off by {old:.3f}, now by {now:.1e}")


def flash_backward(at: Setting) -> None:
    """What the kernel makes of a log-sum-exp that is a view, and whether its results are the same each time."""
    if not at.cuda:
        return suspect("strided log-sum-exp; repeatable backward", "not on a CPU")
    q, k, v, grad = (x[None] for x in random_row(Tree((2048,)), (28, 4, 128), HALF, "cuda"))
    scale, none = 128**-0.5, torch.zeros(2, dtype=torch.uint64, device="cuda")
    out, lse = attention.attend(q, k, v, True, scale)
    wide = torch.cat([lse, torch.randn_like(lse)], dim=-1)  # of a row with more tokens
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    rest = (None, None, 2048, 2048, 0.0, True, none, none)
    right = backward(grad, q, k, v, out, lse, *rest, scale=scale)
    view = backward(grad, q, k, v, out, wide[..., :2048], *rest, scale=scale)
    ours = attention.attend_backward(grad, q, k, v, out, wide[..., :2048], True, scale)
    check("gradient for q with a strided log-sum-exp", distance(ours[0], right[0]), 1e-2)
    cosine = float(torch.cosine_similarity(view[0].float().flatten(), right[0].float().flatten(), dim=0))
    wrong = cosine < 0.999 or cosine != cosine
    suspect("strided log-sum-exp in the flash backward", f"{'confirmed' if wrong else 'refuted'}: cosine {cosine:.3f}")
    again = backward(grad, q, k, v, out, lse, *rest, scale=scale)
    same = all(torch.equal(x, y) for x, y in zip(right, again, strict=True))
    torch.use_deterministic_algorithms(True, warn_only=True)
    pair = [backward(grad, q, k, v, out, lse, *rest, scale=scale) for _ in range(2)]
    torch.use_deterministic_algorithms(False)
    repeats = all(torch.equal(x, y) for x, y in zip(*pair, strict=True))
    suspect("flash backward not repeatable", f"same bits twice: {same}; in deterministic mode: {repeats}")


def kernels(at: Setting, scratch: Path) -> None:
    jobs: list[tuple[Callable, tuple]] = []
    for heads in HEADS:
        for dtype in (HALF, SINGLE):
            jobs += [(tree_attention, (at, heads, dtype)), (cached_attention, (at, heads, dtype))]
        jobs.append((cached_attention, (at, heads, HALF, True)))
    jobs += [(chunked_kl, (at, HALF)), (chunked_kl, (at, SINGLE)), (sampler, (at,)), (score_rounding, (at,))]
    long = Tree((at(8192, 300),), ((64, 1, 33),))
    jobs += [(flash_backward, (at,)), (tree_attention, (at, (7, 1, 128), HALF, long))]
    checks(jobs)


# ---------------------------------------------------------------- the policy


def tower(at: Setting, visual: torch.nn.Module, dtype: torch.dtype) -> None:
    """Whole and cut windows, several clips, against transformers' tower."""
    grids = [(2, 16, 16), (3, 18, 32), (1, 6, 10)]
    patches = normal(sum(t * h * w for t, h, w in grids), 1176, seed=0)
    exact = qwen2_5_vl.encode_clips(copy.deepcopy(visual).double(), patches.double(), grids)
    on = copy.deepcopy(visual).to(at.device, dtype)
    patches = patches.to(at.device)
    theirs = on(patches.to(dtype), grid_thw=torch.tensor(grids, device=at.device))
    theirs = theirs if isinstance(theirs, Tensor) else theirs.pooler_output
    ours = qwen2_5_vl.encode_clips(on, patches, grids)
    compare(f"vision tower, {str(dtype)[6:]}", [ours], [theirs], [exact], "tokens")


def ours_and_naive(name: str, device: str, dtype: torch.dtype) -> tuple[Naive, Ours]:
    """Both engines with the same weights, whatever the device and the type."""
    made = []
    for like in engine.engines(name):
        models = (like.model.to(device, dtype), like.reference.to(device, dtype))
        made.append(type(like)(*models, optimise=False))
    return tuple(made)


def gradient(which: engine.Engine, problem: engine.Problem, autocast: bool) -> list[Tensor]:
    with torch.autocast(which.device.type, HALF, enabled=autocast):
        which.backward(problem, which.reference_states(problem))
    return [torch.cat([p.grad.flatten().double().cpu() for p in which.model.parameters()])]


def whole_gradient(at: Setting, name: str, dtype: torch.dtype, autocast: bool) -> None:
    """Of the loss with its KL, for all weights, two prompts with three responses each."""
    _, exact = ours_and_naive(name, "cpu", torch.float64)
    problem = make_problem(exact.model.config, 64, 3, 24, seed=1, batch=2, per_pass=2)
    problem.mask = (torch.arange(24) < torch.tensor([[3], [24], [17]])).repeat(2, 1, 1)
    naive, ours = ours_and_naive(name, at.device, dtype)
    found = [gradient(ours, problem, autocast), gradient(naive, problem, autocast), gradient(exact, problem, False)]
    kind = "autocast" if autocast else str(dtype)[6:]
    bound = 2 * distance(found[1][0], found[2][0]) + (1e-6 if dtype == SINGLE else 0.0)
    check(f"{name}, gradient of all weights, {kind}", distance(found[0][0], found[2][0]), bound)


PACES = {"eager, looked at each token": (1, 1, False), "eager": (16, 64, False), "graphs": (16, 64, True)}


def play(model: torch.nn.Module, pace: tuple[int, int, bool], turns: int) -> list[tuple[Tensor, Tensor, list]]:
    """Per row: the ids it said [T], the states they were chosen from [T, H], and what it was shown on the way."""
    generator = torch.Generator().manual_seed(5)
    config, group = model.config, 4
    prompts = [engine.random_prompt(config, visual, generator) for visual in (64, 128, 192)]
    shown = [engine.random_piece(config, 64, generator, text=(3, 5)) for _ in range(12)]
    said: list[tuple[list, list, list]] = [([], [], []) for _ in range(3 * group)]
    with mock.patch.object(sampling, "decoding_pace", lambda _: sampling.Pace(*pace)):
        vocabulary = engine.Letters(None, tuple(range(16, 116)), (config.image_token_id, config.video_token_id))
        episodes = sampling.Sampler(
            model, prompts, group, 48, vocabulary, seed=lambda b, n: 100 * b + n, keep_hidden=True
        )
        while found := episodes.sample():
            going = {}
            for turn in found:
                said[turn.row][0].append(turn.ids)
                said[turn.row][1].append(turn.hidden)
                if turn.number + 1 < turns and turn.row % 3:
                    going[turn.row] = shown[turn.row]
            for row_, observation in episodes.observe(going).items():
                said[row_][2].append(observation)
    return prompts, [(torch.cat(ids), torch.cat(states), seen) for ids, states, seen in said]


def learnt(model: torch.nn.Module, prompts: list, said: list) -> Tensor:
    """The states that the update computes for the same tokens, in the order of the rows, [N, H]."""
    count = len(said) // len(prompts)
    longest = max(len(ids) for ids, _, _ in said)
    ids = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids, _, _ in said])
    mask = torch.arange(longest) < torch.tensor([len(ids) for ids, _, _ in said])[:, None]
    seen = [[said[b * count + g][2] for g in range(count)] for b in range(len(prompts))]
    folded = (len(prompts), count, longest)
    with torch.no_grad():
        return policy.group_hidden(model, prompts, ids.view(folded), mask.view(folded), seen)


def sampled_turns(at: Setting, turns: int, name: str = "20m") -> None:
    """In float32 the CPU's tokens; in half precision the same tokens with graphs as without, from states that are as
    near to the update's as those are to float64.
    """
    _, ours = engine.engines(name)
    model = ours.model
    _, expected = play(model, (1, 1, False), turns)
    for pace_name, pace in PACES.items():
        if pace[2] and not at.cuda:
            continue
        _, found = play(copy.deepcopy(model).to(at.device), pace, turns)
        wrong = sum(not torch.equal(x[0], y[0]) for x, y in zip(found, expected, strict=True))
        check(f"{name}, {turns} turns, float32, {pace_name}: other episodes than on the CPU", wrong, 0)
    half = copy.deepcopy(model).to(at.device, HALF)
    for apart in (False, True):
        with stems_apart(at, apart):
            half_turns(at, half, turns, f"{name}, {turns} turns, bfloat16{', stems apart' * apart}")


def half_turns(at: Setting, half: torch.nn.Module, turns: int, name: str) -> None:
    prompts, eager = play(half, PACES["eager"], turns)
    if at.cuda:
        _, captured = play(half, PACES["graphs"], turns)
        wrong = sum(not torch.equal(x[0], y[0]) for x, y in zip(captured, eager, strict=True))
        check(f"{name}: other episodes with graphs than without", wrong, 0)
        eager = captured
    exact = learnt(copy.deepcopy(half).double().cpu(), prompts, eager)
    update, sampled = learnt(half, prompts, eager), torch.cat([states for _, states, _ in eager])
    compare(f"{name}, sampler's states", [sampled], [update], [exact], "states")
    ids = torch.cat([ids for ids, _, _ in eager])[:, None].to(at.device)
    logp = [kl.logits(x, half.lm_head.weight).log_softmax(-1).gather(-1, ids) for x in (sampled, update)]
    apart = (logp[0] - logp[1]).abs()
    suspect(f"sampler and update differ: {name}", f"log p by {apart.mean():.4f}, at most {apart.max():.4f}")


def streamed(at: Setting) -> None:
    _, ours = engine.engines()
    model = ours.reference.to(at.device, HALF)
    problem = make_problem(model.config, 64, 3, 24, batch=2)
    with torch.no_grad():
        resident = policy.group_hidden(model, problem.prompts, problem.responses, problem.mask)
        sharding.stream_layers(model)
        found = policy.group_hidden(model, problem.prompts, problem.responses, problem.mask)
    check("streamed reference", distance(found, resident), 0)


def shards(at: Setting, scratch: Path) -> None:
    """FSDP2 on this device alone: the tokens of the same weights without it, by graphs where there are any."""
    backend = "nccl" if at.cuda else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{scratch}/store", rank=0, world_size=1)
    _, ours = engine.engines()
    model = ours.model.to(at.device, HALF)
    pace = PACES["graphs" if at.cuda else "eager"]
    _, expected = play(model, pace, 3)
    whole = sharded(policy.Policy(model))
    with sharding.whole_weights(whole):
        _, found = play(model, pace, 3)
    wrong = sum(not torch.equal(x[0], y[0]) for x, y in zip(found, expected, strict=True))
    check("sharded by FSDP2, 3 turns, bfloat16: other episodes than without", wrong, 0)
    distributed.destroy_process_group()


def whole_policy(at: Setting, scratch: Path) -> None:
    _, ours = engine.engines()
    visual = ours.model.model.visual
    jobs: list[tuple[Callable, tuple]] = [(tower, (at, visual, dtype)) for dtype in (HALF, SINGLE)]
    for name in ("20m", "tiny"):
        jobs += [(whole_gradient, (at, name, *kind)) for kind in ((HALF, False), (SINGLE, False), (SINGLE, True))]
    jobs += [(sampled_turns, (at, 1)), (sampled_turns, (at, 3)), (streamed, (at,)), (shards, (at, scratch))]
    with torch.no_grad():
        checks(jobs[:2])
    checks(jobs[2:])


def families(at: Setting, scratch: Path) -> None:
    """The built-in Qwen3-VL with random weights."""
    jobs: list[tuple[Callable, tuple]] = []
    jobs += [(whole_gradient, (at, "qwen3", *kind)) for kind in ((HALF, False), (SINGLE, False), (SINGLE, True))]
    jobs += [(sampled_turns, (at, turns, "qwen3")) for turns in (1, 3)]
    checks(jobs)


# ---------------------------------------------------------------- training


def supervised(ours: Ours, steps: int, autocast: bool) -> list[float]:
    """The losses of AdamW on random responses: -log p and KL."""
    optimizer, losses = torch.optim.AdamW(ours.model.parameters(), lr=1e-3), []
    for k in range(steps):
        problem = make_problem(ours.model.config, 64, 4, 32, seed=k, batch=2, per_pass=2)
        with torch.autocast(ours.device.type, HALF, enabled=autocast):
            (state,) = ours.reference_states(problem)
            hidden = ours.hidden(ours.model, problem, slice(2))
            weights = torch.full((ours.model.lm_head.out_features,), engine.BETA, device=ours.device)
            targets = problem.responses[problem.mask].to(ours.device)
            reference = ours.reference.lm_head.weight
            stats = kl.chunked_weighted_kl(
                hidden, state, ours.model.lm_head.weight, weights, 64, targets, lm_head_q=reference
            )
            loss = (stats.kl - stats.logp).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def rewarded(device: str, autocast: bool, steps: int, seed: int) -> list[float]:
    """The rewards of GRPO from the same weights, sampled anew in each step; `seed` is of prompts and samples. A
    response's reward is its share of tokens with an even id.
    """
    _, ours = ours_and_naive("20m", device, SINGLE)
    optimizer, rewards = torch.optim.AdamW(ours.model.parameters(), lr=3e-4), []
    for k in range(1000 * seed, 1000 * seed + steps):
        problem = make_problem(ours.model.config, 64, 8, 24, seed=k, batch=2, per_pass=2)
        with torch.autocast(device, HALF, enabled=autocast):
            turns = sampling.generate(
                ours.model,
                problem.prompts,
                8,
                24,
                engine.endless(VISION),
                seed=lambda row, _, k=k: 100 * k + 10 * (row // 8) + row % 8,
            )
            ids = torch.stack([turn.ids for turn in turns]).view(2, 8, 24)
            reward = (ids % 2 == 0).float().mean(-1)  # [B, G]
            advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
            problem.responses, problem.advantages = ids, advantages[..., None].expand(ids.shape)
            ours.backward(problem, ours.reference_states(problem))
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(reward.mean()))
    return rewards


def losses(at: Setting, scratch: Path) -> None:
    """On the same data: autocast on a CPU moves the losses by 0.2% of their fall in 20 steps, so at most 1%."""
    found = []
    for device, autocast in (("cpu", False), (at.device, True)):
        _, ours = ours_and_naive("20m", device, SINGLE)
        found.append(supervised(ours, at(20, 4), autocast))
    head("step", "loss, CPU float32", f"loss, {at.device} autocast")
    cpu, other = found
    say(*(row([k, f"{x:.4f}", f"{y:.4f}"]) for k, (x, y) in enumerate(zip(cpu, other, strict=True))))
    apart = max(abs(x - y) for x, y in zip(cpu, other, strict=True)) / (cpu[0] - cpu[-1])
    head("check", "error", "bound", "")
    check("losses, largest difference over their fall", apart, 0.01)


AUTOCAST = {"float32": False, "autocast": True}
SEEDS, SECONDS = 5, 70  # of rewards: so many seeds, or as many as fit


def rise(rewards: Sequence[float]) -> float:
    """From the first quarter of the steps to the last."""
    quarter = len(rewards) // 4
    return (sum(rewards[-quarter:]) - sum(rewards[:quarter])) / quarter


def reward_rises(at: Setting, scratch: Path) -> None:
    """Rewards of other samples as soon as one token differs, which rise ever faster: so one run says little. The mean
    rise over the seeds may differ by three standard errors.
    """
    steps, end = at(20, 4), time.monotonic() + SECONDS
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # a thread would slow the others down
        cpu = alone.submit(rewarded, "cpu", False, steps, 0)
        found: dict[str, list[list[float]]] = {name: [] for name in AUTOCAST}
        for seed in range(at(SEEDS, 2)):
            if seed > 1 and time.monotonic() > end:
                break
            for name, autocast in AUTOCAST.items():
                found[name].append(rewarded(at.device, autocast, steps, seed))
        single = cpu.result()
    runs = {"CPU float32, seed 0": [single]} | {f"{at.device} {name}": runs for name, runs in found.items()}
    head("step", *runs)
    for k in range(steps):
        say(row([k, *(f"{statistics.mean(run[k] for run in series):.3f}" for series in runs.values())]))
    head("arithmetic", "rise of the rewards per seed", "mean", "standard deviation")
    for name, series in runs.items():
        rises = list(map(rise, series))
        deviation = f"{statistics.stdev(rises):.3f}" if len(rises) > 1 else "-"
        say(row([name, ", ".join(f"{x:.3f}" for x in rises), f"{statistics.mean(rises):.3f}", deviation]))
    one, other = (list(map(rise, found[name])) for name in AUTOCAST)
    error = ((statistics.variance(one) + statistics.variance(other)) / len(one)) ** 0.5
    head("check", "error", "bound", "")
    apart = abs(statistics.mean(one) - statistics.mean(other))
    check(f"rise of the rewards in {len(one)} seeds, difference of the means", apart, 3 * error)


def training(at: Setting, scratch: Path) -> None:
    parts([(losses, (at, scratch)), (reward_rises, (at, scratch))])
