"""A whole 7B step on a GPU that is not there: PyTorch's CUDA build makes CUDA tensors without memory.

    python -m benchmarks.fake_gpu [--model 7b] [--layers 4] [--out benchmarks/results/fake_gpu.md] [--group_size 16]

It needs PyTorch's CUDA build and no GPU (`pip install torch==2.11.0`); all other options are those of train.py. Tensors
on the CPU are real, those on the GPU have a shape, a type and a place, but no values. So an operation on two devices
raises as it would there, and what the host does is what it does there; counted are

- waits: the host needs a value from the device, by the line that asks; in between, it runs ahead of the device
- copies to the device, at which the host waits too unless the source is pinned
- operations of matrix products and attention, without regard to what a causal mask leaves out
- the most bytes of tensors alive in each phase, beside what `benchmarks/memory.py` expects

Values that the host asks for are 0 (a mask: true everywhere). autograd's own engine needs a real device, so the
backward pass is walked through here, node by node (`Backward`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import math
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

import benchmarks.absent  # noqa: F401
import config as configuration
import kl
from benchmarks import memory
from benchmarks.engine import endless, make_problem, row
from benchmarks.memory import GIB, ROOT, TEXT_TOKENS
from config import Config
from engine import sampling
from engine.families import family_of
from engine.lora import adapters_off, add_adapters
from grpo import loss_count, objective
from kl import Reference
from policy import Policy, group_hidden, last_hidden
from train import MicroBatch

aten = torch.ops.aten
HALF = torch.bfloat16


class FakeGPU(FakeTensorMode):
    """Within it, tensors on the CPU are real and those on the GPU fake; see the file's docstring for what it counts."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()
        self.flops = self.live = self.peak = 0
        self.within = False  # an operation that is one kernel there
        self.sizes: dict[int, int] = {}  # of storages that are alive

    def begin(self) -> None:
        """A new phase."""
        self.waits.clear()
        self.uploads.clear()
        self.flops, self.peak = 0, self.live

    def watch(self, result: object) -> None:
        """Count the bytes of new storages, until they are gone. A GPU allocates multiples of 512 bytes."""
        for x in tree_leaves(result):
            if on_gpu(x):
                storage = x.untyped_storage()
                key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
                if key not in self.sizes:
                    self.sizes[key] = size
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        to = None if target is None else torch.device(target).type
        if not fake and to != "cuda":
            with torch.utils._python_dispatch._disable_current_modes():
                return func(*args, **kwargs)
        if fake and (asked := self.asked_by_host(func, args, kwargs, to)) is not None:
            self.waits[line()] += 1
            return asked
        if func is aten.index.Tensor:
            args = (args[0], self.chosen(args[1]))
        if not fake and func is aten._to_copy.default:
            self.uploads[line()] += 1
        if self.within:  # a kernel, of which this is what FakeTensorMode takes it apart into
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.within = func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.within = False
        self.flops += operations(func._overloadpacket, args)
        self.watch(result)
        return result

    def asked_by_host(self, func, args, kwargs, to: str | None) -> object:
        """The stand-in for a value that the host asks the device for; None if it does not."""
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0.5 if args[0].is_floating_point() else 0
        if func is aten.equal.default:
            return True
        if func is aten._to_copy.default and to == "cpu":
            with torch.utils._python_dispatch._disable_current_modes():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return None

    def chosen(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Masks among indices as the places that they choose, all of them: the host waits for their number."""
        found: list[Tensor | None] = []
        for index in indices:
            if on_gpu(index) and index.dtype == torch.bool:
                self.waits[line()] += 1
                found += [index.new_zeros(index.numel(), dtype=torch.long) for _ in range(index.dim())]
            else:
                found.append(index)
        return found


def operations(packet, args: Sequence) -> int:
    """Floating-point operations of a matrix product or fused attention; 0 of anything else."""
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        a, b = args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
        return 2 * a.numel() * b.shape[-1]
    if str(packet).startswith("aten._scaled_dot_product"):
        backward = str(packet).endswith("backward")
        q, k = args[backward : backward + 2]  # [n, heads, L, d], [n, key heads, S, d]
        return (10 if backward else 4) * q.numel() * k.shape[2]
    return 0


def on_gpu(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def line() -> str:
    """The line of the project that is being executed, without this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


# ---------------------------------------------------------------- a backward pass without autograd's engine


class Backward:
    """Walks the graph of a loss from its end; a node is let go, with what it has saved, as soon as it has been used.

    As autograd does: gradients are added up, cast to the type of what they are for, and kept in `grad` of leaves.
    """

    def __init__(self, root, watched: Callable[[str], None]):
        self.watched = watched  # is told the name of each node before it is computed
        self.grads: dict[object, dict[int, Tensor]] = {root: {}}
        self.pending: collections.Counter = collections.Counter()
        self.places = collections.Counter({root: 1})  # of incoming gradients
        todo, seen = [root], {root}
        while todo:
            for following, place in todo.pop().next_functions:
                if following is not None:
                    self.pending[following] += 1
                    self.places[following] = max(self.places[following], place + 1)
                    if following not in seen:
                        seen.add(following)
                        todo.append(following)
        self.ready = [root]
        # A function of ours lives as long as what leads to it, whoever holds its Python object: so that is kept.
        self.leading: dict[object, object] = {}

    def run(self, gradient: Tensor) -> None:
        """From the root's gradient on; of the nodes that are ready, autograd takes the one made last."""
        self.grads[self.ready[0]][0] = gradient
        while self.ready:
            last = max(range(len(self.ready)), key=lambda k: self.ready[k]._sequence_nr())
            self.step(self.ready.pop(last))

    @torch.no_grad()
    def step(self, node) -> None:
        self.watched(type(node).__name__)
        grads = self.grads.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            del self.places[node]
            leaf = node.variable
            leaf.grad = grads[0] if leaf.grad is None else leaf.grad.add_(grads[0])
            return
        count, ours = self.places.pop(node), isinstance(node, BackwardCFunction)
        if ours:  # gradients of outputs that lead nowhere are None
            named = inspect.signature(type(node)._forward_cls.backward).parameters.values()
            count = max(count, sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in named) - 1)
        function = node.apply if ours else node
        results = function(*(grads.get(k) for k in range(count))) if grads else [None] * len(node.next_functions)
        results = results if isinstance(results, tuple) else (results,)
        behind = self.leading.pop(node, None)
        for (following, place), grad in zip(node.next_functions, results, strict=False):
            if following is None:
                continue
            if isinstance(following, BackwardCFunction):
                self.leading[following] = (node, behind)
            if grad is not None:
                if not isinstance(following, BackwardCFunction):
                    wanted = following._input_metadata[place]
                    grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                slots = self.grads.setdefault(following, {})
                slots[place] = added(slots.pop(place), grad) if place in slots else grad
            self.pending[following] -= 1
            if not self.pending[following]:
                del self.pending[following]
                self.ready.append(following)


def added(held: Tensor, grad: Tensor) -> Tensor:
    """The sum; in place, as in autograd, of a tensor that nothing else holds."""
    alone = sys.getrefcount(held) <= 3  # here, the caller's stack and getrefcount's own
    return held.add_(grad) if alone else held + grad


# ---------------------------------------------------------------- a step


@dataclass
class Found:
    """What a phase of a step cost: the most bytes alive, operations, and where the host waited or copied."""

    peak: int
    flops: int
    waits: dict[str, int]
    uploads: dict[str, int]


class Step:
    """Policy and reference of a shape on a GPU that is not there, and the phases of one of train.py's steps."""

    def __init__(self, gpu: FakeGPU, model_config, recipe: Config):
        self.gpu, self.recipe, self.found = gpu, recipe, {}
        self.model = build(model_config, HALF if recipe.lora_rank else torch.float32)
        self.model.model.visual.requires_grad_(recipe.train_vision)
        if recipe.lora_rank:
            names = recipe.lora_targets.split(",")
            with torch.device("cuda"), mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                add_adapters(self.model, recipe.lora_rank, recipe.lora_alpha, names, recipe.train_vision, recipe.seed)
            self.reference = self.model
        else:
            self.reference = build(model_config, HALF).requires_grad_(False)
        self.policy = Policy(self.model).train()
        if recipe.gradient_checkpointing:
            self.policy.checkpoint_activations()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)
        visual = memory.visual_tokens(recipe, recipe.budget, recipe.v_max)
        zoom_budget, _, zoom_v_max = recipe.zoom_limits
        zoomed = memory.visual_tokens(recipe, zoom_budget, zoom_v_max)
        problem = partial(make_problem, model_config, text=(TEXT_TOKENS // 2, TEXT_TOKENS // 2))
        size = (recipe.group_size, recipe.max_tokens)
        self.rolled = problem(whole(visual), *size, batch=recipe.rollout_batch).prompts
        self.zoomed = problem(whole(zoomed), 1, 1, batch=recipe.zoom_batch).prompts
        updated = problem(whole(visual), *size, batch=recipe.prompts_per_pass)
        self.batch = MicroBatch(
            ids=[],
            prompts=updated.prompts,
            responses=updated.responses,
            mask=updated.mask,
            advantages=updated.advantages,
            observations=[[[] for _ in range(recipe.group_size)] for _ in updated.prompts],
        )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.gpu.begin()
        yield
        self.note(name)

    def note(self, name: str) -> None:
        gpu = self.gpu
        self.found[name] = Found(gpu.peak, gpu.flops, dict(gpu.waits), dict(gpu.uploads))
        gpu.begin()

    def run(self) -> None:
        self.optimise()  # the step before, which has made the moments
        self.roll_out()
        self.update()
        self.optimise()

    def optimise(self) -> None:
        if self.trained[0].grad is None:
            self.begin_gradients()
        with self.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def begin_gradients(self) -> None:
        for p in self.trained:
            p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def roll_out(self) -> None:
        size, length = self.recipe.group_size, self.recipe.max_tokens
        # Graphs cannot be captured, but their steps can be taken one by one.
        pace = replace(sampling.decoding_pace(self.model), capture=False)
        with autocast(), mock.patch.object(sampling, "decoding_pace", lambda _: pace):
            with self.phase("prefill"):
                sampler = sampling.Sampler(self.model, self.rolled, size, length, endless(), seed=lambda row, _: row)
            with self.phase("decode"):
                sampler._step(length)
            del sampler
            with self.phase("zoom"):
                hidden = last_hidden(self.model, self.zoomed)
                kl.logits(*kl.same_dtype(hidden, self.model.lm_head.weight))

    def update(self) -> None:
        recipe, batch = self.recipe, self.batch
        self.begin_gradients()  # of the micro-batch before
        weights = torch.full((len(self.model.lm_head.weight),), recipe.beta, device="cuda")
        shown = (batch.prompts, batch.responses, batch.mask, batch.observations)
        lora = self.reference is self.model
        cast = autocast() if lora else contextlib.nullcontext()
        with self.phase("reference"), torch.no_grad(), adapters_off(self.reference), cast:
            states = group_hidden(self.reference, *shown)
        head = None if lora else self.reference.lm_head.weight
        reference = Reference(states, head, weights, torch.tensor([15, 16], device="cuda"))
        count = loss_count(batch.mask, recipe.normalise, recipe.max_tokens)

        def loss_of(hidden: Tensor, lm_head: Tensor) -> Tensor:
            self.note("forward")
            loss, _ = objective(batch, reference, count, recipe, hidden, lm_head)
            return loss

        with autocast():
            loss = batch.pass_through(self.policy, loss_of)
        self.note("KL, forward")
        backward = Backward(loss.grad_fn, self.passed)
        one = torch.ones_like(loss)
        del loss
        backward.run(one)
        self.note("backward")

    def passed(self, name: str) -> None:
        """In the backward pass, the KL is the first that takes memory; it is a phase by itself."""
        if name.startswith("_ChunkedKL"):
            self.note("after the KL")
            self.in_kl = True
        elif getattr(self, "in_kl", False):
            self.note("KL, backward")
            self.in_kl = False


def whole(visual: int) -> int:
    """A number of visual tokens that pairs of frames of 64 tokens make up."""
    return math.ceil(visual / 64) * 64


def build(model_config, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("cuda"):
        return family_of(model_config).model._from_config(model_config, attn_implementation="sdpa", dtype=dtype)


def flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """Attention by the kernel that a GPU takes; which one that is, torch would ask the device."""
    q, k, v = (x.to(HALF) if torch.is_autocast_enabled("cuda") else x for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)[0]


def autocast() -> torch.autocast:
    return torch.autocast("cuda", HALF)


@contextlib.contextmanager
def as_with_a_device() -> Iterator[None]:
    """torch's autocast looks for a device; tensors that are there have a guard that does nothing."""
    torch._C._ensureCUDADeviceGuardSet()
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", flash),
        mock.patch("torch._C._current_graph_task_id", lambda: 1),  # by which checkpointing knows a backward pass
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- what it shows

# The phases of benchmarks/memory.py, and those here of which each is the greatest.
EXPECTED = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "zoom": ("zoom",),
    "reference": ("reference",),
    "KL": ("KL, forward", "KL, backward"),
    "backward": ("backward",),
    "optimiser": ("optimiser",),
}


def compare(step: Step, model_config) -> list[str]:
    """Peaks beside the formulas', without their allowance for what torch does not count."""
    found = memory.totals(memory.parts(model_config, step.recipe))
    lines = [row(["phase", "peak, GiB", "memory.py, GiB", "memory.py / peak"]), row(["---"] + ["---:"] * 3)]
    for phase, names in EXPECTED.items():
        peak, expected = max(step.found[name].peak for name in names), found[phase] - memory.ALLOWANCE
        lines.append(row([phase, f"{peak / GIB:.2f}", f"{expected / GIB:.2f}", f"{expected / peak:.2f}"]))
    return lines


def costs(step: Step) -> list[str]:
    def places(counted: dict[str, int]) -> str:
        return ", ".join(f"{where} {n}" for where, n in sorted(counted.items())) or "none"

    lines = [row(["phase", "PFLOP", "peak, GiB", "the host waits", "copies to the device"])]
    lines.append(row(["---", "---:", "---:", "---", "---"]))
    for name, f in step.found.items():
        lines.append(row([name, f"{f.flops / 1e15:.3f}", f"{f.peak / GIB:.2f}", places(f.waits), places(f.uploads)]))
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="7b", help=f"{', '.join(memory.SHAPES)}, tiny or a checkpoint's folder")
    parser.add_argument("--layers", type=int, default=0, help="of the language model; 0: all")
    parser.add_argument("--out", help="Markdown, beside what is printed")
    given, options = parser.parse_known_args(arguments)
    recipe = configuration.parse(options, ROOT / "recipes" / "zoom_zero_stage1.yaml")
    model_config = memory.shape(given.model)
    if given.layers:
        model_config.text_config.num_hidden_layers = given.layers
        model_config.text_config.layer_types = model_config.text_config.layer_types[: given.layers]
    if not torch.backends.cuda.is_built():
        sys.exit("error: this needs PyTorch's CUDA build (no GPU): pip install torch")
    start = time.perf_counter()
    with as_with_a_device(), FakeGPU() as gpu:
        step = Step(gpu, model_config, recipe)
        step.run()
    command = " ".join(["python -m benchmarks.fake_gpu", *(sys.argv[1:] if arguments is None else arguments)])
    lines = [f"`{command}`: torch {torch.__version__}, {time.perf_counter() - start:.0f} s, no GPU.", ""]
    lines += [*costs(step), "", *compare(step, model_config)]
    print("\n".join(lines))
    if given.out:
        Path(given.out).write_text("# A 7B step on a GPU that is not there\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
