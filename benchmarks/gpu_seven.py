"""What Qwen2.5-VL-7B's shapes cost on one GPU, with ours and with transformers alone: the sections *seven* and *plain*
of `benchmarks/gpu.py`.
"""

from __future__ import annotations

import collections
import copy
import importlib.util
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList

import kl
import policy
from benchmarks import engine, memory
from benchmarks.engine import Cost, Meter, Naive, Ours, make_problem, row
from benchmarks.gpu_checks import (
    HALF,
    SINGLE,
    Setting,
    check,
    head,
    ours_and_naive,
    parts,
    say,
    stems_apart,
    suspect,
)
from benchmarks.memory import GIB, Parameters, cache_bytes_per_token, shape
from config import Config
from engine import sampling, sharding
from engine.attention import GroupCache, Tree

# ---------------------------------------------------------------- 7B


def host_waits(at: Setting, job: Callable[[], object]) -> collections.Counter | None:
    """How often the host waits for the GPU, by the line that makes it wait; None on a CPU."""
    if not at.cuda:
        job()
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)


def shown_waits(found: collections.Counter | None) -> str:
    if found is None:
        return "-"
    places = ", ".join(f"{place} {n}" for place, n in found.most_common(3))
    return f"{found.total()}" + (f" ({places})" if places else "")


def build(at: Setting) -> torch.nn.Module:
    """Random weights in bfloat16, made on the device."""
    with torch.device(at.device):
        config = shape("20m" if at.dry else "7b")
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=HALF)
    at.wait()
    return model


def seconds_of(at: Setting, job: Callable[[], object]) -> float:
    """Of one call, after one that is not counted."""
    job()
    at.wait()
    start = time.perf_counter()
    job()
    at.wait()
    return time.perf_counter() - start


def limits_of(at: Setting) -> tuple[float, float]:
    """Measured operations of bfloat16 matrix products, and bytes of memory traffic, per second."""
    n, times = at(8192, 256), 10
    a, b = (torch.randn(n, n, device=at.device).to(HALF) for _ in range(2))
    source = torch.empty(at(2**31, 2**20), dtype=torch.uint8, device=at.device)
    target = torch.empty_like(source)
    product, copying = partial(torch.mm, a, b), partial(target.copy_, source)
    peak = times * 2 * n**3 / seconds_of(at, lambda: [product() for _ in range(times)])
    traffic = times * 2 * source.numel() / seconds_of(at, lambda: [copying() for _ in range(times)])
    say("", f"Measured: {peak / 1e12:.0f} TFLOP/s of bfloat16 products ({n} x {n}), {traffic / 1e12:.2f} TB/s copied.")
    return peak, traffic


class Seven:
    """The model and the problem of the timings, and what the device can do."""

    def __init__(self, at: Setting, scratch: Path):
        self.at, self.scratch, self.seconds, self.peaks = at, scratch, {}, {}
        self.visual, self.group, self.length = at(8192, 128), at(8, 2), at(512, 8)
        self.peak, self.traffic = limits_of(at)
        start = time.perf_counter()
        self.model = build(at)
        self.resting = torch.cuda.memory_allocated() if at.cuda else 0
        say("", f"Weights: {self.resting / GIB:.1f} GiB, made in {time.perf_counter() - start:.1f} s.")
        self.config = self.model.config
        self.ours = Ours(self.model, self.model, optimise=False)
        self.meter = Meter(at.device, memory=at.cuda)
        self.problem = make_problem(self.config, self.visual, self.group, self.length)

    def measure(self, name: str, job: Callable[[], object], flops: float) -> None:
        """A row of the table of phases: the better of two runs; the first one counts the host's waits."""
        costs, waits = [], None
        for k in range(2):
            self.meter.start()
            found = host_waits(self.at, job) if k == 0 else job()
            costs.append(self.meter.stop())
            waits = found if k == 0 else waits
        cost = min(costs, key=lambda cost: cost.seconds)
        self.seconds[name], self.peaks[name] = cost.seconds, self.resting + max(cost.bytes for cost in costs)
        speed = flops / cost.seconds
        cells = [f"{cost.seconds:.3f}", f"{flops / 1e12:.1f}", f"{speed / 1e12:.0f}", f"{speed / self.peak:.0%}"]
        say(row([name, *cells, f"{self.gib(cost):.1f}", shown_waits(waits)]))

    def gib(self, cost: Cost) -> float:
        return (self.resting + cost.bytes) / GIB

    def prompt(self) -> policy.Prompt:
        """The problem's prompt with its visual tokens encoded."""
        prompt = copy.copy(self.problem.prompts[0])
        prompt.videos = [copy.copy(video) for video in prompt.videos]
        policy.keep_tokens(self.model, prompt.videos)
        return prompt


def warm_up(s: Seven) -> None:
    """Kernels are chosen and compiled."""
    engine.costs(s.ours, make_problem(s.config, 64, 2, 8), without=["rollout"], memory=s.at.cuda)


def forward_phases(s: Seven) -> None:
    vision, language = engine.vision_flops(s.config, s.visual), engine.language_flops(s.config, s.visual)
    together = engine.language_flops(s.config, s.visual, s.group, s.length)
    head("phase", "s", "TFLOP", "TFLOP/s", "of the peak", "peak, GiB", "host waits")
    with torch.no_grad():
        s.measure("vision", lambda: policy.encode_videos(s.model, s.problem.prompts[0].videos), vision)
    prompt = s.prompt()
    s.measure("prefill and first token", lambda: begin(s, [prompt], s.length, True), language)
    s.measure("reference", lambda: s.ours.reference_states(s.problem), vision + together)


def update_phase(s: Seven) -> None:
    """Forward, backward with recomputation, and the KL; gradients are 17 GB more."""
    states = s.ours.reference_states(s.problem)
    flops = engine.vision_flops(s.config, s.visual)
    flops += engine.language_flops(s.config, s.visual, s.group, s.length)

    def update() -> None:
        s.ours.backward(s.problem, states)
        s.model.zero_grad()

    s.measure("update, forward and backward", update, 4 * flops)


def zoom_phase(s: Seven) -> None:
    flops = engine.vision_flops(s.config, s.visual) + engine.language_flops(s.config, s.visual)
    s.measure(f"zoom, {s.group} clips, {engine.ZOOM_BATCH} at a time", lambda: s.ours.zoom(s.problem), s.group * flops)


def kl_phase(s: Seven) -> None:
    """The KL alone, forward and backward: four products forth, four back, of rows with the vocabulary."""
    n, lm_head = s.group * s.length, s.model.lm_head.weight
    p, q = (torch.randn(n, lm_head.shape[1], device=lm_head.device).to(HALF) for _ in range(2))
    p.requires_grad_()
    weights = torch.ones(len(lm_head), device=lm_head.device)
    targets = torch.zeros(n, dtype=torch.long, device=lm_head.device)

    def run() -> None:
        stats = kl.chunked_weighted_kl(p, q, lm_head, weights, engine.KL_CHUNK, targets)
        (stats.kl - stats.logp).sum().backward()
        s.model.zero_grad()

    s.measure("(KL alone, a part of the update)", run, 6 * 2 * n * lm_head.numel())


def planned(config, recipe: Config, visual: int, text: int) -> list[memory.Part]:
    """The plan of benchmarks/memory.py for clips and prompts of exactly so many tokens."""
    with mock.patch.multiple(memory, visual_tokens=lambda *_: visual, TEXT_TOKENS=text):
        return memory.parts(config, recipe, fsdp=not recipe.lora_rank)  # shards keep bfloat16 between layers, as here


def peaks(s: Seven) -> None:
    """Weights and gradients are bfloat16 here, and nobody keeps AdamW's moments; the rest is the plan's. Of the update
    it is a bound: it adds all gradients to all that is kept for the backward pass, which makes room for them.
    """
    recipe = Config(group_size=s.group, max_tokens=s.length, rollout_batch=1, zoom_batch=engine.ZOOM_BATCH)
    found = planned(s.config, recipe, s.visual, sum(engine.TEXT))
    weights = 2 * Parameters.of(s.config).total
    # A pass of the reference alone comes before anything is kept for the update.
    plans = {name: weights for name in s.peaks if name[0] != "("}
    for name in plans:
        kind = name.split()[0].strip(",")
        phases = {"update": ("backward",), "prefill": ("prefill",), "zoom": ("zoom",), "reference": ("reference",)}
        for part in found:
            work = part.name.startswith("~") or part.name.startswith(
                ("rollout", "update") if kind != "reference" else "~"
            )
            plans[name] += part.bytes if work and set(part.phases) & set(phases.get(kind, ())) else 0
        plans[name] += weights if kind == "update" else 0
    head("peak", "measured, GiB", "planned, GiB")
    say(*(row([name, f"{s.peaks[name] / GIB:.1f}", f"{plan / GIB:.1f}"]) for name, plan in plans.items()))
    head("check", "error", "bound", "")
    for name, plan in plans.items():
        if s.at.cuda and not name.startswith(("vision", "update")):
            check(f"peak beside its plan, {name}", abs(s.peaks[name] / plan - 1), 0.1)


def begin(s: Seven, prompts: list, length: int, capture: bool) -> sampling.Sampler:
    pace = sampling.Pace(16, 256, capture and s.at.cuda, leave=0.5)  # a GPU's, with graphs or without
    with mock.patch.object(sampling, "decoding_pace", lambda _: pace):
        return sampling.Sampler(s.model, prompts, s.group, length, engine.endless(), seed=lambda b, n: b)


def decoding(s: Seven, count: int, length: int, capture: bool, apart: bool = True) -> None:
    """A row of the table of decoding: `count` prompts with their groups, `length` tokens each; long stems apart, or all
    in one softmax.
    """
    with stems_apart(s.at, apart):
        _decoding(s, count, length, capture, "" if apart else ", one softmax")


def _decoding(s: Seven, count: int, length: int, capture: bool, how: str) -> None:
    episodes = begin(s, [s.prompt()] * count, length, capture)
    plain, captures = sampling.Graphs.run, []

    def run(graphs: sampling.Graphs, key: object, function: Callable[[], None]) -> None:
        if key in graphs.captured:
            return plain(graphs, key, function)
        s.at.wait()
        start = time.perf_counter()
        plain(graphs, key, function)
        s.at.wait()
        captures.append(time.perf_counter() - start)

    s.meter.start()
    with mock.patch.object(sampling.Graphs, "run", run):
        while episodes.sample():
            pass
    cost = s.meter.stop()
    steps = length - 1 - len(captures)
    per_step = (cost.seconds - sum(captures)) / steps
    n, per_token = Parameters.of(s.config), cache_bytes_per_token(s.config)
    traffic = 2 * (n.layers + (n.head or n.embedding)) + count * (s.visual + s.group * length / 2) * per_token
    least = traffic / s.traffic
    with torch.no_grad():
        waits = None if capture else host_waits(s.at, partial(episodes._step, 64))
    name = f"{count} x {s.group}, {length} tokens, {'graphs' if capture else 'no graphs'}{how}"
    if count == 1 and not how:
        s.seconds[f"decode, {'graphs' if capture else 'no graphs'}"] = per_step
        s.seconds["capture"] = sum(captures)
    cells = [f"{1000 * per_step:.2f}", f"{count * s.group / per_step:,.0f}", f"{1000 * least:.2f}"]
    cells += [f"{least / per_step:.0%}", f"{len(captures)} in {sum(captures):.2f} s", f"{s.gib(cost):.1f}"]
    say(row([name, *cells, shown_waits(waits)]))
    if waits is not None:
        suspect("host waits in a decoding step", f"{waits.total()}")


def decode_tables(s: Seven) -> None:
    head("decoding", "ms per step", "tokens/s", "limit, ms", "share", "captures", "peak, GiB", "host waits per step")
    runs = ((1, s.length, True), (1, s.at(128, 8), True, False), (1, s.at(64, 8), False))
    for run in (*runs, (8, s.at(128, 8), True), (8, s.at(128, 8), True, False)):
        parts([(decoding, (s, *run))])


def cached_layers(s: Seven) -> None:
    """The cached attention of one layer: what FLASH_STEM chooses by."""
    t, length, many = s.config.text_config, s.visual, s.at(20, 2)
    heads, keys = t.num_attention_heads, t.num_key_value_heads
    size = t.hidden_size // heads
    head(
        "prompts x responses",
        "tokens of a prompt",
        "scores of a stem",
        "one softmax, us",
        "stems apart, us",
        "limit, us",
    )
    for count, group, tokens in (
        (1, 8, length),
        (8, 8, length),
        (32, 1, length),
        (64, 1, length // 8),
        (8, 8, length // 8),
    ):
        stems = tuple(tokens - b % 5 for b in range(count))
        cache = GroupCache(Tree(stems), group, 256)
        row_of = partial(torch.randn, device=s.at.device, dtype=HALF)
        cache.prefill(0, row_of(keys, sum(stems), size), row_of(keys, sum(stems), size))
        cache.place(torch.full((count, group), 100, device=s.at.device), 256)
        step = [row_of(n, count * group, size) for n in (heads, keys, keys)]
        seconds = []
        for apart in (False, True):
            with stems_apart(s.at, apart), torch.no_grad():
                seconds.append(repeated(s.at, partial(cache.attend, 0, *step, size**-0.5), many))
        least = 4 * keys * size * (sum(stems) + 100 * count * group) / s.traffic
        scores = heads * group * tokens
        say(row([f"{count} x {group}", tokens, f"{scores:,}", *(f"{1e6 * x:.0f}" for x in (*seconds, least))]))


def repeated(at: Setting, job: Callable[[], object], many: int) -> float:
    """Seconds of one of `many` calls, in a graph as when decoding."""
    if not at.cuda:
        return seconds_of(at, job)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        job()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(many):
            job()
    return seconds_of(at, graph.replay) / many


def whole_step(s: Seven) -> None:
    """What the phases add up to for 8 prompts per GPU, and the figures for the section *plain*."""
    x = s.seconds
    per_prompt = sum(x.get(name, 0.0) for name in x if name[0] != "(" and name[:6] not in ("decode", "captur"))
    decode = s.length * x.get("decode, graphs", 0.0)
    say(
        "", f"Without decoding a prompt takes {per_prompt:.2f} s; 8 prompts {8 * per_prompt / 60:.2f} min and decoding "
    )
    say(f"them one after the other {8 * decode / 60:.2f} min (an estimate from the operations was 0.9 to 1.3 min).")
    (s.scratch / "seven").write_text("\n".join(f"{name}\t{seconds}" for name, seconds in x.items()))


def streamed_seven(s: Seven) -> None:
    """The reference with its layers in the CPU's memory; last, because the model stays like that."""
    sharding.stream_layers(s.model)
    seconds = seconds_of(s.at, lambda: s.ours.reference_states(s.problem))
    moved = 2 * Parameters.of(s.config).layers / 1e9
    resident = s.seconds.get("reference", float("nan"))
    suspect("streamed layers", f"reference {seconds:.2f} s, resident {resident:.2f} s, {moved:.0f} GB moved per pass")


def seven(at: Setting, scratch: Path) -> None:
    s = Seven(at, scratch)
    jobs = (warm_up, forward_phases, update_phase, zoom_phase, kl_phase, peaks, decode_tables, whole_step)
    parts([(job, (s,)) for job in (*jobs, cached_layers, streamed_seven)])


# ---------------------------------------------------------------- transformers alone


class Stamps(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self, at: Setting):
        self.at, self.times = at, []

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.at.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def ratio(at: Setting, scratch: Path, name: str, seconds: float, ours: str, note: str = "") -> None:
    """A row with what the section *seven* measured for the same."""
    file = scratch / "seven"
    known = dict(line.split("\t") for line in file.read_text().splitlines()) if file.exists() else {}
    mine = sum(float(known.get(part, "nan")) for part in ours.split("; "))
    say(row([name, f"{seconds:.3f}", f"{mine:.3f}", f"{seconds / mine:.1f}", note]))


def generate(at: Setting, naive: Naive, visual: int, group: int, length: int) -> list[float]:
    """Seconds from the beginning to each token."""
    prompt = make_problem(naive.model.config, visual, 1, 1).prompts
    stamps = Stamps(at)
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": group, "max_new_tokens": length}
    naive.model.eval()  # in training mode with checkpointing, transformers would not use the cache
    start = time.perf_counter()
    with torch.no_grad():
        criteria = StoppingCriteriaList([stamps])
        fields = naive.inputs(prompt)
        naive.model.generate(**fields, **how, eos_token_id=None, pad_token_id=0, stopping_criteria=criteria)
    naive.model.train()
    return [stamp - start for stamp in stamps.times]


def plain_rollout(at: Setting, naive: Naive, scratch: Path, visual: int, group: int) -> None:
    generate(at, naive, 64, 2, 4)  # kernels are chosen and compiled
    times = generate(at, naive, visual, group, at(24, 4))
    ratio(at, scratch, "vision, prefill, first token", times[0], "vision; prefill and first token", f"{group} copies")
    step = (times[-1] - times[1]) / (len(times) - 2)
    ratio(at, scratch, "a step of decoding", step, "decode, graphs", f"{len(times)} tokens, cache of {group} copies")


def plain_training(at: Setting, naive: Naive, scratch: Path, visual: int, group: int) -> None:
    length, copies = at(512, 8), 2
    problem = make_problem(naive.model.config, visual, copies, length)
    scale = group / copies
    meter = Meter(at.device, memory=at.cuda)
    meter.start()
    states = naive.reference_states(problem)
    note = f"of {copies} copies, times {scale:g}"
    ratio(at, scratch, "reference", scale * meter.stop().seconds, "reference", note)
    meter.start()
    naive.backward(problem, states)
    cost = meter.stop()
    note += f"; {cost.bytes / GIB:.1f} GiB beside weights"
    ratio(at, scratch, "update", scale * cost.seconds, "update, forward and backward", note)
    naive.model.zero_grad()
    problem.zooms = problem.zooms[:1]
    meter.start()
    naive.zoom(problem)
    ours = f"zoom, {group} clips, {engine.ZOOM_BATCH} at a time"
    ratio(at, scratch, "zoom", group * meter.stop().seconds, ours, f"of one clip, times {group}")


def with_trl(at: Setting) -> None:
    """The 20M policy in float32, text alone, if TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        return say("", "TRL is not installed.")
    _, ours = ours_and_naive("20m", at.device, SINGLE)
    ours.optimizer = torch.optim.AdamW(ours.model.parameters(), lr=0.0)
    problem = make_problem(ours.model.config, at(4096, 64), at(8, 2), at(128, 4), text_only=True)
    table, _ = engine.comparison(engine.with_trl(ours, problem, 2), "TRL", [("step", ["step"], engine.STEP)])
    say("", "TRL, 20M parameters, float32, text alone:", "", *table)


def plain(at: Setting, scratch: Path) -> None:
    model = build(at)
    naive = Naive(model, model, optimise=False)
    visual, group = at(8192, 128), at(8, 2)
    parts([(engine.costs, (naive, make_problem(model.config, 64, 2, 8), ["rollout"], at.cuda))])
    head("phase", "transformers, s", "ours, s", "times", "")
    parts([(job, (at, naive, scratch, visual, group)) for job in (plain_rollout, plain_training)])
    parts([(with_trl, (at,))])
