"""VideoZoomer on the built-in world: its ablations, and accuracy against the frames that are used.

    python -m benchmarks.zoomer --exemplars CHECKPOINT --coarse CHECKPOINT    # every run that is missing, then tables
    python -m benchmarks.zoomer --jobs 0                                      # the tables of the runs so far

Ablations: runs of recipes/cpu_world_agent.yaml from the same cold start, with R_tool's weight 0.5 (as released), 0,
0.25 and 1; with glances of 5 to 20 frames, drawn anew for each prompt (ParaVT, arXiv 2605.20342); with frames for one
call alone; from `--exemplars`, the same cold start without reflection data; and from checkpoints/tiny, which has never
made a call. Accuracy and calls are those of greedy episodes about the test questions; sampled calls are those of
training.

Accuracy against frames: agents trained with R_tool, as they are and with one call allowed; agents trained without it,
as they are, with no call allowed, and so from frames spread over the whole video, as many as the former use on
average ("uniform"); and `--coarse`, a policy trained for spans (recipes/cpu_world.yaml): from such frames,
coarse-to-fine and by divide-and-conquer. Frames are those of all passes of the model; no answer is a wrong one.

What came out is kept in benchmarks/results/zoomer.jsonl (benchmarks/ledger.py), and is not repeated. Writes
benchmarks/results/zoomer.md and .png.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import config as configuration
import infer
from annotations.rows import Sample
from annotations.samples import load_samples
from benchmarks import ledger as ledgers
from benchmarks.ledger import ROOT, TEN, Ledger, beginning, lines_of, noted_run, recipe_hash
from benchmarks.main_job import spread
from benchmarks.seeds import common_seeds, figure, paired_cells
from harness.asking import Agent, Steps, side_by_side
from infer import Settings

RUNS, RESULTS = ROOT / "runs" / "zoomer", ROOT / "benchmarks" / "results"
RECIPE = ["--config", "recipes/cpu_world_agent.yaml", "--world_test_videos", "40"]
TRAINING = ["--steps", "40", "--prompts_per_step", "4", "--prompts_per_pass", "4"]
START, NEVER_CALLED = ROOT / "checkpoints" / "tiny-zoomer", ROOT / "checkpoints" / "tiny"
COLD_START = ROOT / "recipes" / "cpu_world_agent_sft.yaml"
KINDS = ("coarse", "fine", "blink", "pair")


@dataclass(frozen=True)
class Variant:
    """A line of the table: what it is called, the options that make it, what it starts from (None: `--exemplars`)."""

    label: str
    options: tuple[str, ...] = ()
    start: Path | None = START


VARIANTS = {
    "tool-0.5": Variant("R_tool 0.5", ("--tool_weight", "0.5")),
    "tool-0": Variant("R_tool 0", ("--tool_weight", "0")),
    "exemplars": Variant("R_tool 0.5, without reflection data", start=None),
    "cold": Variant("R_tool 0.5, without cold start", start=NEVER_CALLED),
    "random": Variant("R_tool 0.5, glances of 5 to 20 frames", ("--least_frames", "5")),
    "tight": Variant("R_tool 0.5, frames for one call", ("--total_frames", "30")),
    "tool-0.25": Variant("R_tool 0.25", ("--tool_weight", "0.25")),
    "tool-1": Variant("R_tool 1", ("--tool_weight", "1")),
}
# Which variants are compared, seed by seed.
PAIRS = (
    ("tool-0.5", "tool-0"),
    ("tool-0.25", "tool-0"),
    ("tool-1", "tool-0"),
    ("tool-0.5", "exemplars"),
    ("random", "tool-0.5"),
    ("random", "tool-0"),
    ("tight", "tool-0.5"),
)
# Ways of asking: the agents of a variant, with these options changed, and those of the policy for spans.
AGENTS: dict[str, tuple[str, dict[str, float]]] = {
    "agent": ("tool-0.5", {}),
    "agent, one call": ("tool-0.5", {"max_turns": 2, "max_calls": 1}),
    "agent without R_tool": ("tool-0", {}),
    "the same, no call": ("tool-0", {"max_turns": 1}),
}
UNIFORM = "the same, uniform frames"
STRATEGIES = (*AGENTS, UNIFORM, "uniform frames", "coarse-to-fine", "divide-and-conquer")


def key(name: str) -> tuple[str, list[str]]:
    """What a run begins with, and its options. Weights that are not kept go by the recipe that made them."""
    recipe = ROOT / RECIPE[1]
    if name in STRATEGIES:
        return beginning(START, recipe), []
    variant = VARIANTS[name]
    made = beginning(variant.start, recipe) if variant.start else f"{recipe_hash(COLD_START)}-{recipe_hash(recipe)}"
    return made, [*RECIPE[2:], *TRAINING, *variant.options]


def run(ledger: Ledger, name: str, seed: int, start: Path, cache: Sequence[str]) -> None:
    """One run of a variant."""

    def note(out: Path) -> dict:
        curves = ledgers.curves_of(out, lambda curve: ledgers.reward_mean(curve) or curve.startswith("episode/"))
        return {**ledgers.scores_of(out, ("all", "by_kind")), "curves": curves}

    options = [*RECIPE[:2], *ledger.key(name)[1], "--model", str(start), *cache]
    before = RUNS / f"before-{name}-{ledger.key(name)[0]}.jsonl"
    noted_run(ledger, name, seed, RUNS / f"{name}-{seed}", options, before, note)


def asked(agent: Agent, ask: Callable[[Agent, Sample], Steps], samples: list[Sample]) -> dict[str, float]:
    """Accuracy, on all questions, on coarse ones and on the others; frames and visual tokens per question."""
    questions = ((sample, ask(agent, sample)) for sample in samples)
    found = [(result, sample) for sample, result, _ in side_by_side(questions, agent.config.eval_batch)]
    right = {kind: [result.answer == s.answer for result, s in found if s.kind == kind] for kind in KINDS}
    return {
        "accuracy": statistics.mean(itertools.chain.from_iterable(right.values())),
        "coarse": statistics.mean(right["coarse"]),
        "others": statistics.mean(itertools.chain.from_iterable(right[kind] for kind in KINDS[1:])),
        "frames": statistics.mean(result.frames for result, _ in found),
        "visual tokens": statistics.mean(result.visual_tokens for result, _ in found),
    }


def strategies(ledger: Ledger, coarse: Path, extra: Sequence[str]) -> None:
    """Ask each agent and the policy for spans in each way that is not in the ledger yet."""
    device, ended = torch.device("cpu"), ledger.ended()
    own = configuration.parse([*RECIPE, *extra])
    samples = load_samples("world", "test", own)
    runs = {name: [seed for other, seed in sorted(ended) if other == name] for name in ("tool-0.5", "tool-0")}
    if not all(runs.values()):
        return
    used = round(statistics.mean(ended["tool-0.5", seed]["after"]["all"]["frames"] for seed in runs["tool-0.5"]))
    uniform = {"fps": used / own.world_duration, "max_frames": used}

    def note(name: str, seed: int, model: Path, ask: Callable, settings: Settings, changes: dict[str, float]) -> None:
        if (name, seed) not in ended and model.exists():
            base = configuration.parse(["--model", str(model)]) if model == coarse else replace(own, model=str(model))
            agent = infer.load_agent(base, device)
            agent = replace(agent, config=replace(agent.config, **changes))
            ledger.add(name, seed, "started")
            ledger.add(name, seed, "ended", **asked(agent, partial(ask, settings=settings), samples))

    for name, (variant, changes) in (AGENTS | {UNIFORM: ("tool-0", {"max_turns": 1} | uniform)}).items():
        for seed in runs[variant]:
            note(name, seed, RUNS / f"{variant}-{seed}" / "checkpoint", infer.play_episode, Settings(), changes)
    wider = uniform | {"budget": max(configuration.parse([]).budget, 4 * used)}
    note("uniform frames", 0, coarse, infer.one_stage, Settings(), wider)
    note("coarse-to-fine", 0, coarse, infer.coarse_to_fine, Settings(), {})
    note("divide-and-conquer", 0, coarse, infer.divide_and_conquer, Settings(window=10, window_budget=88), {})


# ---------------------------------------------------------------- tables


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def accuracies(results: dict[str, list[dict]]) -> str:
    """A line per variant: accuracy before, after and by kind, form, frames."""
    text = []
    for name, runs in results.items():
        before, after = ([run[when] for run in runs] for when in ("before", "after"))
        cells = [[found["all"]["accuracy"] for found in when] for when in (before, after)]
        cells += [[found["by_kind"][kind]["accuracy"] for found in after] for kind in KINDS]
        cells += [[found["all"][score] for found in after] for score in ("format", "frames")]
        text.append([f"{VARIANTS[name].label} ({len(runs)})", *map(spread, cells)])
    return rows(["", "accuracy before", "after", *KINDS, "format", "frames"], text)


def calls(results: dict[str, list[dict]]) -> str:
    """A line per variant: calls per sampled episode in the first and the last ten steps, per greedy episode by kind."""
    text = []
    for name, runs in results.items():
        cells = [[run["curves"]["episode/calls"][place] for run in runs] for place in (0, -1)]
        for when in ("before", "after"):
            cells += [[run[when]["by_kind"][kind]["calls"] for run in runs] for kind in KINDS]
        text.append([VARIANTS[name].label, *map(spread, cells)])
    head = ["", "sampled, first ten steps", "last ten", *(f"{kind}, before" for kind in KINDS)]
    return rows([*head, *(f"{kind}, after" for kind in KINDS)], text)


def differences(found: dict[tuple[str, int], dict]) -> str:
    """A line per pair of variants: how they differ after training, seed by seed."""
    text = []
    for one, other in PAIRS:
        seeds = common_seeds(found, (one, other))
        if not seeds:
            continue
        after = [(found[one, seed]["after"], found[other, seed]["after"]) for seed in seeds]
        gains = [a["all"]["accuracy"] - b["all"]["accuracy"] for a, b in after]
        coarse = [
            [a["by_kind"]["coarse"][score] - b["by_kind"]["coarse"][score] for a, b in after]
            for score in ("accuracy", "calls")
        ]
        pair = f"{VARIANTS[one].label} minus {VARIANTS[other].label}"
        text.append([pair, f"{len(seeds)}", *paired_cells(gains), *map(figure, coarse)])
    return rows(["", "seeds", "accuracy", "p", "above 0", "coarse: accuracy", "calls"], text)


def picture(points: dict[str, list[dict]], results: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against frames, a point for each model; calls over training, means over seeds and `TEN` steps."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for (name, found), marker in zip(points.items(), "o<p>xs^D", strict=False):
        left.plot([p["frames"] for p in found], [p["accuracy"] for p in found], marker, label=name)
    left.set(xlabel="frames per question", ylabel="accuracy", ylim=(0, 1))
    for name, runs in results.items():
        means = [
            statistics.mean(block) for block in zip(*(run["curves"]["episode/calls"] for run in runs), strict=True)
        ]
        right.plot([TEN * (k + 1) for k in range(len(means))], means, label=VARIANTS[name].label)
    right.set(xlabel="step", ylabel="calls per sampled episode", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    drawn.savefig(path, dpi=150)


def report(ledger: Ledger, command: str, out: Path) -> str:
    """All tables of the runs so far, as Markdown; draws the picture."""
    found = ledger.ended()
    results = {name: lines for name in VARIANTS if (lines := lines_of(found, name))}
    points = {name: lines for name in STRATEGIES if (lines := lines_of(found, name))}
    scores = ("accuracy", "coarse", "others", "frames", "visual tokens")
    table = [
        [f"{name} ({len(lines)})", *(spread([p[s] for p in lines]) for s in scores)] for name, lines in points.items()
    ]
    picture(points, results, out / "zoomer.png")
    return "\n\n".join(
        [
            "# VideoZoomer on the built-in world",
            f"`{command}`: {TRAINING[1]} steps of {TRAINING[3]} prompts x 8 episodes, mean ± standard deviation over "
            f"seeds. {ledger.count()}",
            "## Ablations",
            "Accuracy (in brackets: runs):",
            accuracies(results),
            "Calls per episode:",
            calls(results),
            "Differences after training, paired by seed (mean ± 95% interval, p of flipping signs, seeds above 0):",
            differences(found),
            "## Accuracy against frames",
            rows(["strategy (models)", *scores], table),
            "![accuracy against frames per question, and calls over training](zoomer.png)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--exemplars", type=Path, help="a cold start without reflection data")
    parser.add_argument("--coarse", type=Path, default=ROOT / "runs" / "cpu_world" / "checkpoint")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread; 0: only the tables")
    parser.add_argument("--rows", type=Path, default=RESULTS / "zoomer.jsonl", help="what came out, a line a run")
    parser.add_argument("--cache", default="cache", help="folder of the built-in world's videos")
    given = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    ledger, cache = Ledger(given.rows, key), ("--cache", given.cache)
    if given.jobs:
        known = ledger.ended()
        starts = {name: VARIANTS[name].start or given.exemplars for name in given.only}
        todo = [
            (name, seed) for seed in given.seeds for name in given.only if starts[name] and (name, seed) not in known
        ]
        with ThreadPoolExecutor(given.jobs) as pool:
            for job in [pool.submit(run, ledger, name, seed, starts[name], cache) for name, seed in todo]:
                job.result()
        strategies(ledger, given.coarse, cache)
    text = report(ledger, " ".join(["python -m benchmarks.zoomer", *sys.argv[1:]]), RESULTS)
    print(text)
    (RESULTS / "zoomer.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
