"""Zoom-Zero's tables on the built-in world: variants of training, several seeds each, and ways of asking.

    python -m benchmarks.zoom_zero                              # every run that is missing, then the tables
    python -m benchmarks.zoom_zero --only grpo both-code --seeds 0 1 --jobs 1
    python -m benchmarks.zoom_zero --jobs 0                     # the tables of the runs so far

A run is `train.py` from the main job's recipe with a variant's options, on one thread. What came out is kept in
benchmarks/results/zoom_zero.jsonl (benchmarks/ledger.py), and is not repeated.

In the tables: mean over seeds with the 95% interval of Student's t; the difference to the first line, paired by seed,
with its interval and the two-sided p-value of the exact test that flips its signs, which cannot be below 2 / 2^seeds.
What an addition changes is a mean over all pairs of lines that differ in it, paired by seed.
"Area" is the mean sampled R_IoU over all steps, "steps" the first at which its mean over ten steps reaches LEVEL.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ledger import ROOT, TEN, Ledger, beginning, curves_of, lines_of, noted_run, reward_mean, scores_of
from benchmarks.seeds import common_seeds, figure, paired_cells
from report.drawing import add_legend, line_look, new_figure, save_figure, tidy
from report.results import stored_rows
from report.scores import by_kind, overall

RUNS = ROOT / "runs" / "zoom_zero"
RESULTS = ROOT / "benchmarks" / "results"
START = ROOT / "checkpoints" / "tiny"
RECIPE = ROOT / "recipes" / "cpu_world.yaml"
LEVEL = 0.6  # of R_IoU
SCORES = ("mIoU", "R@0.5", "accuracy", "zoom_accuracy", "Acc@GQA", "format")
COSTS = ("passes", "frames", "visual_tokens", "seconds")
LONG = ("--world_duration", "120", "--world_min_duration", "0")


@dataclass(frozen=True)
class Variant:
    """A line of a table about training: what it is called, and the options of train.py that make it."""

    label: str
    options: tuple[str, ...]


def variant(label: str, options: str) -> Variant:
    return Variant(label, tuple(options.split()))


VARIANTS = {
    "grpo": variant("GRPO: format + IoU + accuracy, summed", "--tokenadv off --zoom_reward false"),
    "tokenadv-paper": variant("+ TokenAdv, Eq. 5 as printed", "--tokenadv paper --zoom_reward false"),
    "tokenadv-code": variant("+ TokenAdv as released", "--tokenadv code --zoom_reward false"),
    "tokenadv-time": variant("+ TokenAdv, times in think as glue", "--tokenadv time --zoom_reward false"),
    "zoom": variant("+ R_zoom", "--tokenadv off"),
    "both-paper": variant("+ both, Eq. 5 as printed", "--tokenadv paper"),
    "both-code": variant("+ both, as released", "--tokenadv code"),
    "both-time": variant("+ both, times in think as glue", "--tokenadv time"),
    "g2": variant("G = 2", "--tokenadv code --group_size 2"),
    "g4": variant("G = 4", "--tokenadv code --group_size 4"),
    "noisy-grpo": variant(
        "each end off by up to 3 s, GRPO", "--tokenadv off --zoom_reward false --world_label_noise 3"
    ),
    "noisy": variant("each end off by up to 3 s, both", "--tokenadv code --world_label_noise 3"),
    "unlabelled": variant("no span labels: R_zoom and R_acc", "--tokenadv code --grounding none"),
    "repeated": variant(
        "both, repeated zoom in the second half, with twice the groups", "--tokenadv code --repeated_zoom 0.5"
    ),
}
TABLES = {
    "TokenAdv and R_zoom (Table 5)": tuple(VARIANTS)[:8],
    "Responses per prompt (Table 9)": ("g2", "g4", "both-code"),
    "Wrong labels, none, repeated zoom (future work)": ("both-code", "noisy-grpo", "noisy", "unlabelled", "repeated"),
}
# What is added, and the lines without and with it: the difference is a mean over these pairs, for each seed.
ADDED = {
    "R_zoom": (
        ("grpo", "zoom"),
        ("tokenadv-paper", "both-paper"),
        ("tokenadv-code", "both-code"),
        ("tokenadv-time", "both-time"),
    ),
    "TokenAdv, Eq. 5 as printed": (("grpo", "tokenadv-paper"), ("zoom", "both-paper")),
    "TokenAdv as released": (("grpo", "tokenadv-code"), ("zoom", "both-code")),
    "TokenAdv, times in think as glue": (("grpo", "tokenadv-time"), ("zoom", "both-time")),
    "as released instead of as printed": (("tokenadv-paper", "tokenadv-code"), ("both-paper", "both-code")),
    "G = 4 instead of 2": (("g2", "g4"),),
    "G = 8 instead of 4": (("g4", "both-code"),),
    "R_zoom and TokenAdv, labels off by up to 3 s": (("noisy-grpo", "noisy"),),
    "labels off by up to 3 s instead of none": (("unlabelled", "noisy"),),
    "repeated zoom in the second half": (("both-code", "repeated"),),
}


def in_windows(window: int, top: int, *more: str) -> tuple[str, ...]:
    """The options of divide-and-conquer in windows of so many frames."""
    return ("--strategy", "divide-and-conquer", *more, "--window", f"{window}", "--top", f"{top}")


MAIN_JOB = "both-code"  # the variant that is the main job; its policies are asked
ASKED = {
    "one-stage": ("--strategy", "one-stage"),
    "coarse-to-fine": ("--strategy", "coarse-to-fine"),
    **{
        f"divide-and-conquer, windows of {window}, top {top}": in_windows(window, top)
        for window, top in ((60, 4), (20, 4), (30, 4), (60, 1), (60, 2), (60, 6))
    },
    **{
        f"divide-and-conquer, windows of {window}, top 4, ranked by answer and spans": in_windows(
            window, 4, "--rank", "answer_and_spans"
        )
        for window in (60, 20)
    },
}
WAYS = {
    "One-stage, coarse-to-fine, divide-and-conquer (Tables 6, 12, 13)": tuple(ASKED)[:3],
    "Divide-and-conquer: window and spans (Tables 10, 11)": tuple(ASKED)[2:],
}


# ---------------------------------------------------------------- runs


def ledger_of(path: Path, start: str) -> Ledger:
    """The lines of a file that are about this start (see `beginning`)."""
    return Ledger(path, lambda name: (start, options_of(name)))


def options_of(name: str) -> list[str]:
    """The options behind the name of a variant or of a way of asking."""
    return list(VARIANTS[name].options if name in VARIANTS else ASKED.get(name, ()))


def note_end(out: Path) -> dict:
    """What is kept of a run that ended: its scores and the curves of its rewards."""
    kept = ("all", "by_kind", "by_duration", "by_clue_length", "by_clue_portion")
    return {**scores_of(out, kept), "curves": curves_of(out, reward_mean)}


def train(ledger: Ledger, name: str, seed: int, extra: Sequence[str]) -> None:
    """One run of a variant; what the start answers is the same for all."""
    options = ["--eval_controls", "false", "--model", str(START), *extra, *options_of(name)]
    before = RUNS / f"before-{ledger.key(name)[0]}.jsonl"
    noted_run(ledger, name, seed, RUNS / f"{name}-{seed}", options, before, note_end)


def ask(ledger: Ledger, name: str, seed: int, extra: Sequence[str]) -> None:
    """Long videos' questions, asked in one way of the policy that the main job has trained with this seed."""
    run = RUNS / f"{MAIN_JOB}-{seed}"
    out = RUNS / f"asked-{seed}" / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    ledger.add(name, seed, "started")
    command = [sys.executable, "infer.py", "--config", str(run / "config.yaml"), "--threads", "1"]
    command += ["--model", str(run / "checkpoint"), "--out", str(out), *extra, *LONG, *options_of(name)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        ledger.add(name, seed, "failed", code=done.returncode)
        return
    rows = stored_rows(out)
    costs = {name: statistics.mean(row[name] for row in rows) for name in COSTS}
    ledger.add(name, seed, "ended", after={"all": overall(rows) | costs, "by_kind": by_kind(rows)})


# ---------------------------------------------------------------- tables


def reached(curve: Sequence[float], level: float = LEVEL) -> int | None:
    """The step at which a curve of ten-step means first is at the level; None if it never is."""
    return next((TEN * (k + 1) for k, value in enumerate(curve) if value >= level), None)


def area(line: dict) -> float:
    """The mean sampled R_IoU over all steps of a run; not a number where it is not paid."""
    return statistics.mean(line["curves"].get("reward/iou_mean", [math.nan]))


def learning(lines: Sequence[dict]) -> list[str]:
    """Area under the curve of R_IoU, and the steps to its level, where R_IoU is paid."""
    paid = [line for line in lines if "reward/iou_mean" in line["curves"]]
    if not paid:
        return ["-", "-"]
    steps = [step for line in paid if (step := reached(line["curves"]["reward/iou_mean"])) is not None]
    text = f"{statistics.mean(steps):.0f} ({len(steps)} of {len(paid)})" if steps else f"never (of {len(paid)})"
    return [figure(list(map(area, paid))), text]


def training_table(found: dict[tuple[str, int], dict], names: Sequence[str]) -> str:
    """Scores after training of each variant, and differences in mIoU to the first one, paired by seed."""
    lines = [
        "| variant | seeds | " + " | ".join(SCORES) + " | area | steps | mIoU minus the first | p |",
        "|---" * (len(SCORES) + 6) + "|",
    ]
    for name in names:
        ended = lines_of(found, name)
        if not ended:
            lines.append(f"| {VARIANTS[name].label} | 0 |{' |' * (len(SCORES) + 4)}")
            continue
        cells = [figure([line["after"]["all"][score] for line in ended]) for score in SCORES]
        both = common_seeds(found, (name, names[0])) if name != names[0] else []
        gains = [found[name, s]["after"]["all"]["mIoU"] - found[names[0], s]["after"]["all"]["mIoU"] for s in both]
        cells += [*learning(ended), *paired_cells(gains)[:2]]
        cells = [VARIANTS[name].label, f"{len(ended)}", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def added_table(found: dict[tuple[str, int], dict]) -> str:
    """What each addition changes, over all lines with and without it, paired by seed; "up": seeds where it is more."""
    scores = {name: lambda line, name=name: line["after"]["all"][name] for name in ("mIoU", "zoom_accuracy", "Acc@GQA")}
    measures = scores | {"area": area}
    lines = ["| added | seeds | " + " | ".join(f"{name} | p | up" for name in measures) + " |"]
    lines.append("|---" * (3 * len(measures) + 2) + "|")
    for label, pairs in ADDED.items():
        seeds = common_seeds(found, itertools.chain.from_iterable(pairs))
        cells = []
        for measure in measures.values():
            gains = [
                statistics.mean(measure(found[new, seed]) - measure(found[old, seed]) for old, new in pairs)
                for seed in seeds
            ]
            cells += paired_cells([gain for gain in gains if not math.isnan(gain)])
        lines.append(f"| {label} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evidence_table(found: dict[tuple[str, int], dict], names: Sequence[str]) -> str:
    """mIoU by how long the evidence is, and which share of the video (Table 2, Figure 3)."""
    kept = {name: lines for name in names if (lines := lines_of(found, name))}
    table = ["| evidence | before | " + " | ".join(VARIANTS[name].label for name in kept) + " |"]
    table.append("|---" * (len(kept) + 2) + "|")
    for by in ("by_clue_length", "by_clue_portion"):
        groups = next(iter(kept.values()))[0]["before"][by] if kept else {}
        for group in groups:
            before = [line["before"][by][group]["mIoU"] for line in next(iter(kept.values()))]
            cells = [figure([line["after"][by][group]["mIoU"] for line in lines]) for lines in kept.values()]
            of = "" if by == "by_clue_length" else " of the video"
            table.append(f"| {group}{of} | {statistics.mean(before):.3f} | {' | '.join(cells)} |")
    return "\n".join(table)


def ways_table(found: dict[tuple[str, int], dict], names: Sequence[str]) -> str:
    """Scores and costs of each way of asking about long videos."""
    columns = ("accuracy", "mIoU", "Acc@GQA", *COSTS)
    lines = ["| strategy | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        ended = lines_of(found, name)
        cells = [figure([line["after"]["all"][column] for line in ended]) if ended else "" for column in columns]
        lines.append(f"| {name} | {len(ended)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, int], dict], names: Sequence[str], out: Path) -> None:
    """Mean curves of R_IoU and R_acc of the variants, with the first one's range over seeds."""
    picture = new_figure(9, 3.6)
    axes = picture.subplots(1, 2)
    for panel, (key, title) in zip(axes, {"iou": "IoU reward", "accuracy": "Answer reward"}.items(), strict=True):
        for k, name in enumerate(names):
            curves = [line["curves"][f"reward/{key}_mean"] for line in lines_of(found, name)]
            if curves:
                steps = [TEN * (n + 1) for n in range(len(curves[0]))]
                columns = list(zip(*curves, strict=True))
                colour, style, _ = line_look(k)
                means = list(map(statistics.mean, columns))
                panel.plot(steps, means, color=colour, linestyle=style, label=VARIANTS[name].label)
                if k == 0:
                    panel.fill_between(
                        steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12
                    )
        panel.set_title(title, fontsize=10)
        tidy(panel)
    add_legend(picture)
    save_figure(picture, out)


def report(ledger: Ledger, command: str) -> str:
    """All tables of the runs so far, as Markdown."""
    found = ledger.ended()
    parts = [
        "# Zoom-Zero's tables on the built-in world",
        f"`{command}`\n\n{ledger.count()} Hashes of weights and recipe: {ledger.key(MAIN_JOB)[0]}. "
        "± 0.000 beside one seed is no interval.",
    ]
    for title, names in TABLES.items():
        parts += [f"## {title}", training_table(found, names)]
    parts += ["## What each addition changes", added_table(found)]
    parts += ["## mIoU by evidence (Table 2, Figure 3)", evidence_table(found, ("grpo", MAIN_JOB))]
    for title, names in WAYS.items():
        parts += [f"## {title}", f"Videos of {LONG[1]} s.", ways_table(found, names)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=(*VARIANTS, "asked"), default=[*VARIANTS, "asked"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread; 0: only the tables")
    parser.add_argument("--rows", type=Path, default=RESULTS / "zoom_zero.jsonl", help="what came out, a line a run")
    parser.add_argument("--cache", default="cache", help="folder of the built-in world's videos")
    options = parser.parse_args()
    ledger, extra = ledger_of(options.rows, beginning(START, RECIPE)), ("--cache", options.cache)
    RUNS.mkdir(parents=True, exist_ok=True)
    known = ledger.ended()
    variants = [name for name in options.only if name != "asked"]
    todo = [(name, seed) for seed in options.seeds for name in variants if (name, seed) not in known]
    if options.jobs:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: train(ledger, *job, extra), todo))
            if "asked" in options.only:
                ended = ledger.ended()
                trained = [s for s in options.seeds if (MAIN_JOB, s) in ended and (RUNS / f"{MAIN_JOB}-{s}").is_dir()]
                ways = [(name, seed) for seed in trained for name in ASKED if (name, seed) not in known]
                list(pool.map(lambda job: ask(ledger, *job, extra), ways))
    text = report(ledger, " ".join(["python -m benchmarks.zoom_zero", *sys.argv[1:]]))
    print(text)
    (RESULTS / "zoom_zero.md").write_text(text)
    draw(ledger.ended(), TABLES["TokenAdv and R_zoom (Table 5)"], RESULTS / "zoom_zero.png")


if __name__ == "__main__":
    main()
