"""VideoZoomer on the built-in world: its ablations, and accuracy against the frames that are used.

    python -m benchmarks.zoomer --start CHECKPOINT [--exemplars CHECKPOINT] [--coarse CHECKPOINT] [--seeds 0 1 2 3 4]

Ablations: runs of recipes/cpu_world_agent.yaml from the same cold start, with R_tool's weight 0.5 (as released), 0,
0.25 and 1; with glances of 5 to 20 frames, drawn anew for each prompt (ParaVT, arXiv 2605.20342); with frames for one
call alone; from `--exemplars`, a cold start without reflection data; and from checkpoints/tiny, which has never made a
call. Accuracy and calls are those of greedy episodes about the test questions; sampled calls are those of training.

Accuracy against frames: agents trained with R_tool, as they are and with one call allowed; agents trained without it,
as they are, with no call allowed, and so from frames spread over the whole video, as many as the former use on average
("uniform"); and `--coarse`, a policy trained for spans (recipes/cpu_world.yaml): from such frames, coarse-to-fine and
by divide-and-conquer. Frames are those of all passes of the model; no answer is a wrong one.

Runs go to runs/zoomer/VARIANT-SEED; what is finished is not repeated. Writes benchmarks/results/zoomer.md and .png.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from benchmarks.main_job import finished_run, spread
from harness.asking import Agent, Steps, side_by_side
from infer import Settings

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "zoomer"
RECIPE = ["--config", "recipes/cpu_world_agent.yaml", "--world_test_videos", "40"]
NEVER_CALLED = ROOT / "checkpoints" / "tiny"
KINDS = ("coarse", "fine", "blink", "pair")
TEN = 10  # steps at the beginning and at the end


def variants(start: Path, exemplars: Path | None) -> dict[str, tuple[str, list[str]]]:
    """The lines of the table, by name of their runs: what is different, and the options that make it so."""

    def weighted(weight: str) -> tuple[str, list[str]]:
        return f"R_tool {weight}", ["--model", str(start), "--tool_weight", weight]

    lines = {"tool-0.5": weighted("0.5"), "tool-0": weighted("0")}
    if exemplars:
        lines["exemplars"] = ("R_tool 0.5, without reflection data", ["--model", str(exemplars)])
    lines["cold"] = ("R_tool 0.5, without cold start", ["--model", str(NEVER_CALLED)])
    released, options = lines["tool-0.5"]
    lines["random"] = (f"{released}, glances of 5 to 20 frames", [*options, "--least_frames", "5"])
    lines["tight"] = (f"{released}, frames for one call", [*options, "--total_frames", "30"])
    return lines | {"tool-0.25": weighted("0.25"), "tool-1": weighted("1")}


def run(name: str, options: list[str], seed: int, steps: int) -> dict:
    """The evaluation of a finished run, with its metrics."""
    out = RUNS / f"{name}-{seed}"
    result = finished_run(out, seed, [*RECIPE, *options, "--steps", str(steps), "--threads", "1"])
    result["steps"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return result


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def accuracies(lines: dict[str, tuple[str, list[str]]], results: dict[str, list[dict]]) -> str:
    """A line per variant: accuracy before, after and by kind, frames."""
    text = []
    for name, runs in results.items():
        before, after = ([run[when] for run in runs] for when in ("before", "after"))
        cells = [[found["all"]["accuracy"] for found in when] for when in (before, after)]
        cells += [[found["by_kind"][kind]["accuracy"] for found in after] for kind in KINDS]
        cells += [[found["all"]["frames"] for found in after]]
        text.append([f"{lines[name][0]} ({len(runs)})", *map(spread, cells)])
    return rows(["", "accuracy before", "after", *KINDS, "frames"], text)


def calls(lines: dict[str, tuple[str, list[str]]], results: dict[str, list[dict]]) -> str:
    """A line per variant: calls per sampled episode in the first and the last ten steps, per greedy episode by kind."""
    text = []
    for name, runs in results.items():
        cells = [
            [statistics.mean(calls_sampled(run)[part]) for run in runs] for part in (slice(TEN), slice(-TEN, None))
        ]
        for when in ("before", "after"):
            cells += [[run[when]["by_kind"][kind]["calls"] for run in runs] for kind in KINDS]
        text.append([lines[name][0], *map(spread, cells)])
    head = ["", "sampled, first ten steps", "last ten", *(f"{kind}, before" for kind in KINDS)]
    return rows([*head, *(f"{kind}, after" for kind in KINDS)], text)


def calls_sampled(run: dict) -> list[float]:
    """Calls per episode of each training step."""
    return [row["episode/calls"] for row in run["steps"]]


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


def strategies(paid: list[Path], unpaid: list[Path], coarse: Path) -> dict[str, list[dict[str, float]]]:
    """Each strategy's accuracy and cost: of agents trained with R_tool and without it, and of a policy for spans."""
    device = torch.device("cpu")
    own = configuration.parse(RECIPE)
    samples = load_samples("world", "test", own)

    def play(models: list[Path], **changes: float) -> list[dict[str, float]]:
        agents = [infer.load_agent(replace(own, model=str(model)), device) for model in models]
        limited = [replace(agent, config=replace(agent.config, **changes)) for agent in agents]
        return [asked(agent, partial(infer.play_episode, settings=Settings()), samples) for agent in limited]

    found = {"agent": play(paid), "agent, one call": play(paid, max_turns=2, max_calls=1)}
    used = round(statistics.mean(one["frames"] for one in found["agent"]))
    spread_out = {"fps": used / own.world_duration, "max_frames": used}
    found["agent without R_tool"] = play(unpaid)
    found["the same, no call"] = play(unpaid, max_turns=1)
    found[f"the same, {used} uniform frames"] = play(unpaid, max_turns=1, **spread_out)
    policy = infer.load_agent(configuration.parse(["--model", str(coarse)]), device)
    spread_out["budget"] = max(policy.config.budget, 4 * used)
    uniform = replace(policy, config=replace(policy.config, **spread_out))
    windows = Settings(window=10, window_budget=88)
    for name, agent, ask, settings in (
        (f"{used} uniform frames", uniform, infer.one_stage, Settings()),
        ("coarse-to-fine", policy, infer.coarse_to_fine, Settings()),
        ("divide-and-conquer", policy, infer.divide_and_conquer, windows),
    ):
        found[name] = [asked(agent, partial(ask, settings=settings), samples)]
    return found


def picture(
    found: dict[str, list[dict[str, float]]],
    lines: dict[str, tuple[str, list[str]]],
    results: dict[str, list[dict]],
    path: Path,
) -> None:
    """Accuracy against frames, a point for each model; calls over training, a mean over seeds and `TEN` steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, points), marker in zip(found.items(), "o<p>xs^D", strict=True):
        left.plot([p["frames"] for p in points], [p["accuracy"] for p in points], marker, label=name)
    left.set(xlabel="frames per question", ylabel="accuracy", ylim=(0, 1))
    for name, runs in results.items():
        means = [statistics.mean(step) for step in zip(*map(calls_sampled, runs), strict=True)]
        smooth = [statistics.mean(means[max(0, k - TEN + 1) : k + 1]) for k in range(len(means))]
        right.plot(range(1, len(smooth) + 1), smooth, label=lines[name][0])
    right.set(xlabel="step", ylabel="calls per sampled episode", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, default=ROOT / "checkpoints" / "tiny-zoomer", help="the cold start")
    parser.add_argument("--exemplars", type=Path, help="a cold start without reflection data")
    parser.add_argument("--coarse", type=Path, default=ROOT / "runs" / "cpu_world" / "checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--report", action="store_true", help="run nothing; the tables are about what is finished")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    given = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    lines = variants(given.start, given.exemplars)
    with ThreadPoolExecutor(given.jobs) as pool:
        wanted = [(name, seed) for name in lines for seed in given.seeds]
        if given.report:
            wanted = [(name, seed) for name, seed in wanted if (RUNS / f"{name}-{seed}" / "seconds.json").exists()]
        jobs = {(n, seed): pool.submit(run, n, lines[n][1], seed, given.steps) for n, seed in wanted}
        results = {n: [job.result() for (name, _), job in jobs.items() if name == n] for n in lines}
        results = {name: runs for name, runs in results.items() if runs}
    paid, unpaid = (
        [RUNS / f"{name}-{seed}" / "checkpoint" for name, seed in jobs if name == variant]
        for variant in ("tool-0.5", "tool-0")
    )
    found = strategies(paid, unpaid, given.coarse)
    scores = ("accuracy", "coarse", "others", "frames", "visual tokens")
    table = [[name, *(spread([p[key] for p in points]) for key in scores)] for name, points in found.items()]
    out = ROOT / "benchmarks" / "results"
    picture(found, lines, results, out / "zoomer.png")
    text = [
        "# VideoZoomer on the built-in world",
        f"`python -m benchmarks.zoomer {' '.join(sys.argv[1:])}`: {given.steps} steps of 8 prompts x 8 episodes, seeds "
        f"{given.seeds}, mean ± standard deviation.",
        "## Ablations",
        "Accuracy (in brackets: runs):",
        accuracies(lines, results),
        "Calls per episode:",
        calls(lines, results),
        "## Accuracy against frames",
        rows(["strategy", *scores], table),
        "![accuracy against frames per question, and calls over training](zoomer.png)",
    ]
    print("\n\n".join(text))
    (out / "zoomer.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
