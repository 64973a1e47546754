"""LongVTG-R1's Tables 3 and 4 on the built-in world, where events are rare: three of 2 to 4 s in a minute.

    python -m benchmarks.longvtg             # 40 runs of recipes/cpu_longvtg.yaml, two at a time, and their evaluations
    python -m benchmarks.longvtg --jobs 0    # the tables of the runs so far

Table 4: five variants, five seeds each, from the same start; and the rewards once more from a start that misses the
evidence. "No signal" is the share of groups whose responses all got the same grounding reward, over the first and the
last ten steps. In-domain is the test split of the videos trained on; out-of-domain are videos with more events, and
shorter ones. Answers come from the zoomed frames (zooming is not trained here: what accuracy falls by is forgotten, or
due to other spans). Differences between lines are paired by seed, with their 95% interval, the two-sided p-value of the
exact test that flips their signs, and the number of seeds in which they are above 0.

Table 3: direct (the coarse pass answers), ground-then-answer (a trained policy finds the spans, the start answers from
them) and unified (the trained policy does both).

What came out is kept in benchmarks/results/longvtg.jsonl (benchmarks/ledger.py), and is not repeated. Writes
benchmarks/results/longvtg.md.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import config as configuration
from annotations.samples import load_samples
from benchmarks.ledger import ROOT, Ledger, beginning, curves_of, lines_of, noted_run, reward_mean, scores_of
from benchmarks.main_job import spread
from benchmarks.seeds import common_seeds, paired_cells
from engine.loading import load
from policy import Policy, Vocabulary
from world import lessons

RECIPE = ["--config", "recipes/cpu_longvtg.yaml", "--world_test_videos", "40"]
START, LATE_START = "checkpoints/tiny", "runs/longvtg/late-start"
STARTS = {"start": START, "late-start": LATE_START}
RUNS = ROOT / "runs" / "longvtg"
RESULTS = ROOT / "benchmarks" / "results"
LATE = 6.0  # seconds
UNIFORM, NONE, TOKEN_AWARE = (["--beta", b, "--beta_time", t] for b, t in (("0.04", "-1"), ("0", "-1"), ("0.04", "0")))


@dataclass(frozen=True)
class Variant:
    """One line of a table: names of the grounding reward and of the KL penalty, the options that make them."""

    reward: str
    kl: str
    grounding: str
    penalty: list[str]
    start: str = START


ABLATIONS = {
    "uniform": Variant("IoU", "uniform", "iou", UNIFORM),
    "none": Variant("IoU", "none", "iou", NONE),
    "iou": Variant("IoU", "token-aware", "iou", TOKEN_AWARE),
    "giou": Variant("GIoU", "token-aware", "giou", TOKEN_AWARE),
    "cendist": Variant("IoU + CenDist", "token-aware", "tg", TOKEN_AWARE),
}
LATE_ABLATIONS = {f"late-{name}": replace(ABLATIONS[name], start=LATE_START) for name in ("iou", "giou", "cendist")}
VARIANTS = ABLATIONS | LATE_ABLATIONS
PAIRS = [  # (one line, the line it is compared with)
    ("uniform", "none"),
    ("iou", "none"),
    ("iou", "uniform"),
    ("giou", "iou"),
    ("cendist", "iou"),
    ("cendist", "giou"),
    ("late-giou", "late-iou"),
    ("late-cendist", "late-iou"),
    ("late-cendist", "late-giou"),
]
UNIFIED = "cendist"  # the variant whose policies answer in Table 3
ELSEWHERE = {
    "5 events": ["--world_events", "5"],
    "30 s": ["--world_duration", "30"],
}


def options_of(name: str) -> list[str]:
    """The options behind the name of a variant, or of a start."""
    if name in STARTS:
        return [*RECIPE, "--model", STARTS[name]]
    variant = VARIANTS[name]
    return [*RECIPE, "--grounding", variant.grounding, *variant.penalty, "--model", variant.start]


def run(ledger: Ledger, name: str, seed: int, cache: Sequence[str]) -> None:
    """One run of a variant, with its scores elsewhere."""

    def note(out: Path) -> dict:
        kept = scores_of(out, ("all", "by_kind"))
        curves = curves_of(out, lambda key: reward_mean(key) or key.startswith(("zero_variance/", "kl/")))
        return {**kept, "curves": curves, **scores_elsewhere(name, out / "checkpoint", out, cache)}

    before = RUNS / f"before-{Path(VARIANTS[name].start).name}-{ledger.key(name)[0]}.jsonl"
    options = [*options_of(name), *cache]
    noted_run(ledger, name, seed, RUNS / f"{name}-{seed}", options, before, note)


def scores_elsewhere(name: str, model: Path | str, out: Path, cache: Sequence[str]) -> dict:
    """What a model scores on other videos, and what it answers in the ways of Table 3."""
    found = {"elsewhere": {where: evaluated(model, out, where, cache) for where in ELSEWHERE}}
    if name == UNIFIED:
        ways = {
            "direct": ("one-stage", model, None),
            "grounds": ("ground-then-answer", START, model),
            "unified": ("ground-then-answer", model, None),
        }
    elif name == "start":
        ways = {"direct": ("one-stage", START, None), "unified": ("ground-then-answer", START, None)}
    else:
        return found
    return found | {"answers": {key: answered(*way, out / f"{key}.jsonl", cache) for key, way in ways.items()}}


def note_start(ledger: Ledger, name: str, cache: Sequence[str]) -> None:
    """The same of what training starts from."""
    ledger.add(name, 0, "started")
    ledger.add(name, 0, "ended", **scores_elsewhere(name, STARTS[name], RUNS / f"before-{name}", cache))


def make_late_start(cache: Sequence[str]) -> None:
    """Teach the start to claim spans that are `LATE` seconds late: most of its responses miss the evidence entirely."""
    if (ROOT / LATE_START / "config.json").exists():
        return
    config = configuration.parse([*RECIPE, "--world_train_videos", "100", *cache])
    model, tokenizer = load(str(ROOT / START))
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
    tokenizer.save_pretrained(ROOT / LATE_START)
    model.save_pretrained(ROOT / LATE_START)


def evaluated(model: Path | str, folder: Path, where: str, cache: Sequence[str]) -> dict:
    """Scores of a model on videos unlike those it was trained on."""
    out = folder / where.replace(", ", "-").replace(" ", "-")
    command = [sys.executable, "evaluate.py", *RECIPE, "--model", str(model), "--out", str(out), "--threads", "1"]
    command += ["--overwrite", *ELSEWHERE[where], *cache]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "evaluation.json").read_text())["policy"]["all"]


def answered(
    strategy: str, model: Path | str, ground_model: Path | str | None, out: Path, cache: Sequence[str]
) -> float:
    """Accuracy of a strategy on the test split."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)  # of a run that was interrupted
    command = [sys.executable, "infer.py", *RECIPE, "--strategy", strategy, "--model", str(model), "--out", str(out)]
    command += ["--threads", "1", *(["--ground_model", str(ground_model)] if ground_model else [])]
    subprocess.run([*command, *cache], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return statistics.mean(row["predicted_answer"] == row["answer"] for row in rows)


# ---------------------------------------------------------------- tables


def headings() -> list[str]:
    """What `scores` are called."""
    return [f"{score}, {where}" for where in ("in-domain", *ELSEWHERE) for score in ("mIoU", "accuracy")]


def scores(line: dict, when: str) -> list[float]:
    """mIoU and the accuracy of the zoomed answer, on the test split and elsewhere."""
    return [
        part[name] for part in (line[when]["all"], *line["elsewhere"].values()) for name in ("mIoU", "zoom_accuracy")
    ]


def table_4(found: dict[tuple[str, int], dict], variants: dict[str, Variant], start: str) -> str:
    """A line per variant with the number of its seeds; scores before training in the first line."""
    head = ["reward", "KL", "seeds", "no signal, first ten steps", "last ten", *headings(), "KL on time", "KL on text"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    known = [line for name in variants for line in lines_of(found, name)]
    if known and (start, 0) in found:
        before = scores({**known[0], "elsewhere": found[start, 0]["elsewhere"]}, "before")
        lines.append(f"| before training |  |  |  |  | {' | '.join(f'{value:.3f}' for value in before)} |  |  |")
    for name, variant in variants.items():
        runs = lines_of(found, name)
        silent = [run["curves"][f"zero_variance/{variant.grounding}"] for run in runs]
        columns = [[curve[0] for curve in silent], [curve[-1] for curve in silent]]
        columns += map(list, zip(*(scores(run, "after") for run in runs), strict=True))
        columns += [[run["curves"][f"kl/{part}"][-1] for run in runs] for part in ("time", "text")]
        cells = map(spread, columns) if runs else [""] * (len(head) - 3)
        lines.append(f"| {variant.reward} | {variant.kl} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(found: dict[tuple[str, int], dict]) -> str:
    """A line per pair of `PAIRS` that has seeds in common."""

    def label(name: str) -> str:
        return f"{VARIANTS[name].reward}, {VARIANTS[name].kl}{', late start' * (name in LATE_ABLATIONS)}"

    head = ["difference", "seeds", *(cell for name in headings() for cell in (name, "p", "up"))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for pair in PAIRS:
        seeds = common_seeds(found, pair)
        more, than = ([scores(found[name, seed], "after") for seed in seeds] for name in pair)
        gains = [[a - b for a, b in zip(*two, strict=True)] for two in zip(more, than, strict=True)]
        cells = [cell for column in zip(*gains, strict=True) for cell in paired_cells(column)]
        if cells:
            lines.append(f"| {' minus '.join(map(label, pair))} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_3(found: dict[tuple[str, int], dict]) -> str:
    """Three settings; the trained policies are those of IoU + CenDist with the token-aware KL."""
    settings = [
        ("direct", "-", "start", "start", "direct"),
        ("direct", "-", "trained", UNIFIED, "direct"),
        ("ground-then-answer", "start", "start", "start", "unified"),
        ("ground-then-answer", "trained", "start", UNIFIED, "grounds"),
        ("unified", "trained", "trained", UNIFIED, "unified"),
    ]
    lines = ["| setting | finds the spans | answers | seeds | accuracy |", "|---|---|---|---|---|"]
    for setting, finder, answerer, name, key in settings:
        values = [line["answers"][key] for line in lines_of(found, name)]
        cell = spread(values) if values else ""
        lines.append(f"| {setting} | {finder} | {answerer} | {len(values)} | {cell} |")
    return "\n".join(lines)


def report(ledger: Ledger, command: str) -> str:
    """All tables of the runs so far, as Markdown."""
    recipe, found = configuration.parse(RECIPE), ledger.ended()
    return "\n\n".join(
        [
            "# LongVTG-R1's ablations on the built-in world",
            f"`{command}`: mean ± standard deviation over seeds; videos of {recipe.world_duration} s, "
            f"{recipe.world_events} events of 2 to 4 s; {recipe.steps} steps of {recipe.prompts_per_step} prompts x "
            f"{recipe.group_size} responses. {ledger.count()}",
            "## Rewards and KL (Table 4)",
            table_4(found, ABLATIONS, "start"),
            f"The same from a start whose spans are {LATE:g} s late, where most responses miss the evidence",
            table_4(found, LATE_ABLATIONS, "late-start"),
            "Differences (mean ± half of the 95% interval), paired by seed",
            differences(found),
            "## Direct, ground-then-answer, unified (Table 3)",
            table_3(found),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread; 0: only the tables")
    parser.add_argument("--rows", type=Path, default=RESULTS / "longvtg.jsonl", help="what came out, a line a run")
    parser.add_argument("--cache", default="cache", help="folder of the built-in world's videos")
    given = parser.parse_args()
    begun = beginning(ROOT / START, ROOT / RECIPE[1])
    ledger, cache = Ledger(given.rows, lambda name: (begun, options_of(name))), ("--cache", given.cache)
    RUNS.mkdir(parents=True, exist_ok=True)
    if given.jobs:
        make_late_start(cache)
        known = ledger.ended()
        todo = [(name, seed) for seed in given.seeds for name in given.only if (name, seed) not in known]
        with ThreadPoolExecutor(given.jobs) as pool:
            done = [pool.submit(note_start, ledger, name, cache) for name in STARTS if (name, 0) not in known]
            done += [pool.submit(run, ledger, *job, cache) for job in todo]
            for job in done:
                job.result()
    text = report(ledger, " ".join(["python -m benchmarks.longvtg", *sys.argv[1:]]))
    print(text)
    (RESULTS / "longvtg.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
