"""LongVTG-R1's Tables 3 and 4 on the built-in world, where events are rare: three of 2 to 4 s in a minute.

    python -m benchmarks.longvtg             # 40 runs of recipes/cpu_longvtg.yaml, two at a time, and their evaluations

Table 4: five variants, five seeds each, from the same start; and the rewards once more from a start that misses the
evidence. "No signal" is the share of groups whose responses all got the same grounding reward, over the first and the
last ten steps. In-domain is the test split of the videos trained on; out-of-domain are videos with more events, and
shorter ones. Answers come from the zoomed frames (zooming is not trained here: what accuracy falls by is forgotten, or
due to other spans).

Table 3: direct (the coarse pass answers), ground-then-answer (a trained policy finds the spans, the start answers from
them) and unified (the trained policy does both).

Runs go to runs/longvtg/VARIANT-SEED; what is finished is not repeated. Writes benchmarks/results/longvtg.md.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import config as configuration
from annotations.samples import load_samples
from benchmarks.main_job import finished_run, spread
from engine.loading import load
from policy import Policy, Vocabulary
from world import lessons

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ["--config", "recipes/cpu_longvtg.yaml", "--world_test_videos", "40"]
START = ROOT / "checkpoints" / "tiny"
RUNS = ROOT / "runs" / "longvtg"
LATE_START = RUNS / "late-start"
LATE = 6.0  # seconds
UNIFORM, NONE, TOKEN_AWARE = (["--beta", b, "--beta_time", t] for b, t in (("0.04", "-1"), ("0", "-1"), ("0.04", "0")))


@dataclass(frozen=True)
class Variant:
    """One line of a table: names of the grounding reward and of the KL penalty, the options that make them."""

    reward: str
    kl: str
    grounding: str
    penalty: list[str]
    start: Path = START


ABLATIONS = {
    "uniform": Variant("IoU", "uniform", "iou", UNIFORM),
    "none": Variant("IoU", "none", "iou", NONE),
    "iou": Variant("IoU", "token-aware", "iou", TOKEN_AWARE),
    "giou": Variant("GIoU", "token-aware", "giou", TOKEN_AWARE),
    "cendist": Variant("IoU + CenDist", "token-aware", "tg", TOKEN_AWARE),
}
LATE_ABLATIONS = {f"late-{name}": replace(ABLATIONS[name], start=LATE_START) for name in ("iou", "giou", "cendist")}
VARIANTS = ABLATIONS | LATE_ABLATIONS
ELSEWHERE = {
    "5 events": ["--world_events", "5"],
    "30 s": ["--world_duration", "30"],
}
TEN = 10  # steps at the beginning and at the end


def run(variant: str, seed: int) -> dict:
    """The evaluation of a finished run, with its metrics and its scores elsewhere."""
    out = RUNS / f"{variant}-{seed}"
    chosen = VARIANTS[variant]
    options = [
        *RECIPE,
        "--grounding",
        chosen.grounding,
        *chosen.penalty,
        "--model",
        str(chosen.start),
        "--threads",
        "1",
    ]
    result = finished_run(out, seed, options)
    result["steps"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result["elsewhere"] = {name: evaluated(out / "checkpoint", out, name) for name in ELSEWHERE}
    return result


def make_late_start() -> None:
    """Teach the start to claim spans that are `LATE` seconds late: most of its responses miss the evidence entirely."""
    if (LATE_START / "config.json").exists():
        return
    config = configuration.parse([*RECIPE, "--world_train_videos", "100"])
    model, tokenizer = load(str(START))
    vocabulary, policy = Vocabulary.of(tokenizer), Policy(model).train()
    taught = lessons.load_lessons(load_samples("world", "train", config), config, vocabulary, model.config)
    optimizer, steps, rng = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98)), 100, random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - step / steps)
        prompts, answers = [], []
        for lesson in rng.sample(taught, 8):
            for sample, prompt in zip(lesson.samples, lesson.prompts, strict=True):
                shifts = [min(LATE, sample.duration - end) for _, end in sample.evidence]
                late = [(start + s, end + s) for (start, end), s in zip(sample.evidence, shifts, strict=True)]
                words = lessons.demonstration(sample, late, sample.answer, lessons.glimpse(sample))
                prompts.append(prompt)
                answers.append([vocabulary.ids("".join(words))])
        batch = lessons.Batch.of(prompts, answers)
        policy(batch.prompts, batch.ids, batch.mask, partial(lessons.cross_entropy, batch)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(LATE_START)
    model.save_pretrained(LATE_START)


def evaluated(model: Path | str, folder: Path, where: str) -> dict:
    """Scores of a model on videos unlike those it was trained on."""
    out = folder / where.replace(", ", "-").replace(" ", "-")
    if not (out / "evaluation.json").exists():
        command = [sys.executable, "evaluate.py", *RECIPE, "--model", str(model), "--out", str(out), "--threads", "1"]
        subprocess.run([*command, *ELSEWHERE[where]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "evaluation.json").read_text())["policy"]["all"]


def mean_of(run: dict, key: str, steps: slice) -> float:
    """The mean of a figure of the log over some steps."""
    return statistics.mean(row[key] for row in run["steps"][steps])


def table_4(results: dict[str, list[dict]], start_elsewhere: dict[str, dict]) -> str:
    """One line per variant; scores before training in the first line."""
    start = next(iter(results.values()))[0]["before"]["all"]
    names = [f"{score}, {where}" for where in ("in-domain", *ELSEWHERE) for score in ("mIoU", "accuracy")]
    lines = [
        "| reward | KL | no signal, first ten steps | last ten | " + " | ".join(names) + " | KL on time | KL on text |",
        "|---" * (6 + len(names)) + "|",
    ]

    def scores(found: dict, elsewhere: dict[str, dict]) -> list[float]:
        return [part[name] for part in (found, *elsewhere.values()) for name in ("mIoU", "zoom_accuracy")]

    before = " | ".join(f"{value:.3f}" for value in scores(start, start_elsewhere))
    lines.append(f"| before training | | | | {before} | | |")
    for variant, runs in results.items():
        chosen = VARIANTS[variant]
        parts = (slice(0, TEN), slice(-TEN, None))
        silent = [[mean_of(run, f"zero_variance/{chosen.grounding}", part) for run in runs] for part in parts]
        columns = zip(*(scores(run["after"]["all"], run["elsewhere"]) for run in runs), strict=True)
        kls = [[mean_of(run, f"kl/{part}", parts[1]) for run in runs] for part in ("time", "text")]
        cells = map(spread, [*silent, *map(list, columns), *kls])
        lines.append(f"| {chosen.reward} | {chosen.kl} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answered(strategy: str, model: Path | str, out: Path, ground_model: Path | str | None = None) -> float:
    """Accuracy of a strategy on the test split."""
    command = [sys.executable, "infer.py", *RECIPE, "--strategy", strategy, "--model", str(model), "--out", str(out)]
    command += ["--threads", "1", *(["--ground_model", str(ground_model)] if ground_model else [])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return statistics.mean(row["predicted_answer"] == row["answer"] for row in rows)


def table_3(seeds: list[int], pool: ThreadPoolExecutor) -> str:
    """Three settings; the grounding policy is the one of IoU + CenDist with the token-aware KL."""
    trained = [RUNS / f"cendist-{seed}" / "checkpoint" for seed in seeds]
    start = START
    folder = RUNS / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        ("direct", "-", "start", [("one-stage", start, None)]),
        ("direct", "-", "trained", [("one-stage", model, None) for model in trained]),
        ("ground-then-answer", "start", "start", [("ground-then-answer", start, None)]),
        ("ground-then-answer", "trained", "start", [("ground-then-answer", start, model) for model in trained]),
        ("unified", "trained", "trained", [("ground-then-answer", model, None) for model in trained]),
    ]
    lines = ["| setting | finds the spans | answers | accuracy |", "|---|---|---|---|"]
    for setting, finder, answerer, jobs in settings:
        files = [folder / f"{setting}-{finder}-{answerer}-{k}.jsonl" for k in range(len(jobs))]
        values = [
            pool.submit(answered, strategy, model, file, finder)
            for (strategy, model, finder), file in zip(jobs, files, strict=True)
        ]
        lines.append(f"| {setting} | {finder} | {answerer} | {spread([value.result() for value in values])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    given = parser.parse_args()
    recipe = configuration.parse(RECIPE)
    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        make_late_start()
        jobs = [(seed, variant) for seed in given.seeds for variant in VARIANTS]
        done = {job: pool.submit(run, job[1], job[0]) for job in jobs}
        results = {variant: [done[seed, variant].result() for seed in given.seeds] for variant in VARIANTS}
        direct = table_3(given.seeds, pool)
        elsewhere = {
            start: {name: evaluated(start, RUNS / f"before-{start.name}", name) for name in ELSEWHERE}
            for start in (START, LATE_START)
        }
    text = "\n\n".join(
        [
            "# LongVTG-R1's ablations on the built-in world",
            f"`{' '.join(['python -m benchmarks.longvtg', *sys.argv[1:]])}`: seeds {given.seeds}, mean ± standard "
            f"deviation; videos of {recipe.world_duration} s, {recipe.world_events} events of 2 to 4 s; {recipe.steps} "
            f"steps of {recipe.prompts_per_step} prompts x {recipe.group_size} responses.",
            "## Rewards and KL (Table 4)",
            table_4({name: results[name] for name in ABLATIONS}, elsewhere[START]),
            f"The same from a start whose spans are {LATE:g} s late, where most responses miss the evidence",
            table_4({name: results[name] for name in LATE_ABLATIONS}, elsewhere[LATE_START]),
            "## Direct, ground-then-answer, unified (Table 3)",
            direct,
        ]
    )
    print(text)
    (ROOT / "benchmarks" / "results" / "longvtg.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
