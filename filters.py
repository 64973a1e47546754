"""Which samples are worth training on: Zoom-Zero's filter between its two stages, and its checks of two data sets.

    accelerate launch filters.py stage2 --model runs/zoom_zero_stage1/checkpoint --train_data stage1.jsonl --out DIR
    accelerate launch filters.py plm_video --model CHECKPOINT --train_data plm.jsonl --out DIR
    python filters.py qvhighlights --data_format qvhighlights --train_data highlight_train_release.jsonl --out DIR

| filter       | what is measured                               | `paper` (Appendix A): drop a sample if              |
|--------------|------------------------------------------------|-----------------------------------------------------|
| stage2       | accuracy and IoU of G sampled responses        | all are correct, or max IoU - mean IoU < 0.1 (Eq. 6) |
| plm_video    | the answer from the whole video, from the clue | only the one from the clue is correct               |
| qvhighlights | the video's length                             | it is not above 120 s                               |

Other rules, by `--rule`:

- stage2, `released`: the released code keeps a sample if (delta > 0.1 or min IoU > 0) and not all answers are correct.
- plm_video, `sufficient`: drop a sample if the answer from the clue is wrong. The paper says that its check "ensures
  that the clue duration indeed provides sufficient information", but the rule it prints keeps what is answered from
  neither, and drops what is answered from the clue alone.

The paper does not say who answers in plm_video. Here it is `--model`, twice with the prompt of the zoom pass: from the
frames of the coarse pass, and from those of a zoom on the true spans.

`--out` gets verdicts.jsonl, a line per sample with its numbers, "kept" and "reason", and train.jsonl, the kept samples.
What has a line is not measured again: an interrupted run goes on, and a finished one applies another `--rule` or
`--threshold` without a model. Samples are measured in batches that depend on the data alone, and sampling is seeded per
sample, so neither the number of processes nor an interruption changes a result.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import config as configuration
import data
import evaluate
import journal
import world
from config import Config, ConfigError
from data import DataError, Sample
from decode import VideoError, prefetch, probe
from evaluate import view_all
from infer import DECISIVE, Agent, load_agent
from policy import ModelError
from rewards import accuracy_reward, iou_reward, merge
from rollout import View, answer_clips, check_samples, roll_out, zoom_clips

UNREADABLE = "unreadable video"


# ---------------------------------------------------------------- the rules


def iou_delta(ious: Sequence[float]) -> float:
    """How far the best response's IoU is above the mean (Zoom-Zero, Eq. 6)."""
    # Eq. 6: δ = max_i IoU_i - 1/n Σ_i IoU_i
    return max(ious) - fmean(ious)


def stage2_paper(row: Mapping, threshold: float) -> str | None:
    """Why a sample has nothing to teach, or None (Zoom-Zero, Appendix A)."""
    return reasons(row, row["delta"] >= threshold, f"delta < {threshold:g}")


def stage2_released(row: Mapping, threshold: float) -> str | None:
    """The same in the released code, where spans that all overlap the evidence are enough."""
    signal = row["delta"] > threshold or min(row["ious"]) > 0
    return reasons(row, signal, f"delta <= {threshold:g} and an IoU of 0")


def reasons(row: Mapping, signal: bool, otherwise: str) -> str | None:
    """All that speaks against a sample: only correct answers, and no signal in the spans."""
    found = ["all correct"] if min(row["accuracies"]) == 1 else []
    found += [] if signal else [otherwise]
    return ", ".join(found) or None


def clue_only(row: Mapping, _: None) -> str | None:
    """Drop what is answered from the clue, but not from the whole video (Zoom-Zero, Appendix A, as printed)."""
    only = row["clue_answer"] == row["answer"] != row["whole_answer"]
    return "correct from the clue only" if only else None


def clue_insufficient(row: Mapping, _: None) -> str | None:
    """Drop what is not answered from the clue (Zoom-Zero, Appendix A: what the check is said to ensure)."""
    return None if row["clue_answer"] == row["answer"] else "wrong from the clue"


def too_short(row: Mapping, threshold: float) -> str | None:
    """Keep videos longer than so many seconds (Zoom-Zero, Appendix A)."""
    return None if row["duration"] > threshold else f"not above {threshold:g} s"


# ---------------------------------------------------------------- what they need to know


def measure_responses(policy: Agent, views: Sequence[View]) -> list[dict]:
    """Accuracy and IoU of G responses to each question, and Eq. 6."""
    rows = []
    for group in roll_out(policy.model, views, policy.config, policy.vocabulary, step=0):
        sample = group.view.sample
        ious = [iou_reward(response.spans, list(sample.spans)) for response in group.responses]
        accuracies = [accuracy_reward(response.answer, sample.answer) for response in group.responses]
        rows.append({"accuracies": accuracies, "ious": ious, "delta": iou_delta(ious)})
    return rows


def measure_clues(policy: Agent, views: Sequence[View]) -> list[dict]:
    """The letters answered from the whole video and from its true spans alone."""
    rows: list[dict] = []
    jobs = []
    for view in views:
        try:
            clue = zoom_clips(view, [list(view.sample.spans)], policy.config)[0]
        except VideoError as error:
            rows.append({"error": str(error)})
            continue
        rows.append({"answer": view.sample.answer})
        jobs += [(view.sample, view.clip, None), (view.sample, clue, None)]
    zooms = iter(answer_clips(policy.model, jobs, policy.config, policy.vocabulary))
    for row in rows:
        if "answer" in row:
            row["whole_answer"], row["clue_answer"] = next(zooms).answer, next(zooms).answer
    return rows


def with_durations(samples: Sequence[Sample], config: Config) -> tuple[list[Sample], dict[str, VideoError]]:
    """The samples with the durations of their videos in seconds, and the errors of videos that cannot be read."""
    known, unreadable = [], {}
    for sample in samples:
        try:
            known.append(replace(sample, duration=sample.duration or probe(sample.video).duration))
        except VideoError as error:
            unreadable[sample.video] = error
    return known, unreadable


def measure_durations(policy: None, samples: Sequence[Sample]) -> list[dict]:
    return [{"duration": sample.duration} for sample in samples]


@dataclass(frozen=True)
class Filter:
    """One filter: what a sample must have, how samples are measured, and its rules with their threshold's default."""

    needed: tuple[str, ...]
    measure: Callable[[Agent | None, list], list[dict]]
    rules: dict[str, Callable[[Mapping, float | None], str | None]]
    threshold: float | None
    asks: bool  # needs a policy


FILTERS = {
    "stage2": Filter(
        ("options", "answer", "spans"),
        measure_responses,
        {"paper": stage2_paper, "released": stage2_released},
        0.1,
        True,
    ),
    "plm_video": Filter(
        ("options", "answer", "spans"),
        measure_clues,
        {"paper": clue_only, "sufficient": clue_insufficient},
        None,
        True,
    ),
    "qvhighlights": Filter((), measure_durations, {"paper": too_short}, 120.0, False),
}


# ---------------------------------------------------------------- a data set


def measure_all(
    chosen: Filter,
    samples: Sequence[Sample],
    done: Mapping[str, dict],
    path: Path,
    made_with: dict,
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Add a line to the journal `path` for each sample that is not done. Split over processes by batches.

    A batch is always measured whole: rounding, and with it the last digit of a probability, depends on its company.
    """
    size = config.rollout_batch
    batches = [samples[k : k + size] for k in range(0, len(samples), size)]
    rest = [batch for batch in batches if any(sample.id not in done for sample in batch)]
    if not rest:
        return
    policy = load_agent(config, accelerator.device) if chosen.asks else None
    read = view_all if chosen.asks else with_durations
    mine = rest[accelerator.process_index :: accelerator.num_processes]
    shown = {"desc": f"{path}: {len(done)} done", "disable": None if accelerator.is_main_process else True}
    with (
        prefetch(partial(read, batch, config) for batch in mine) as ahead,
        tqdm(total=sum(map(len, mine)), unit="sample", **shown) as bar,
    ):
        for batch, (readable, unreadable) in zip(mine, ahead, strict=True):
            with torch.no_grad(), accelerator.autocast():
                measured = iter(chosen.measure(policy, readable))
            for sample in batch:
                error = unreadable.get(sample.video)
                numbers = next(measured) if error is None else {"error": str(error)}
                if sample.id not in done:
                    journal.append(path, {**identity(sample, config), **numbers, "made_with": made_with})
            bar.update(len(batch))


def identity(sample: Sample, config: Config) -> dict:
    """What a line says about its sample; the video as `train_data` names it, without the folder put before it."""
    root = config.video_root
    inside = root and Path(sample.video).is_relative_to(root)
    video = os.path.relpath(sample.video, root) if inside else sample.video
    return {"id": sample.id, "video": video, "question": sample.question}


def finished(
    path: Path, samples: Sequence[Sample], made_with: dict, config: Config, accelerator: Accelerator
) -> dict[str, dict]:
    """The journal's lines by sample, for every process; DataError if they are not about these samples, made in this
    way.
    """
    rows = journal.resume(path, accelerator)
    journal.check_made_with(rows, made_with)
    known = {sample.id: identity(sample, config) for sample in samples}
    for row in rows:
        about = known.get(row.text("id"), {"id": None})
        for name, value in about.items():
            if row.text(name) != value:
                raise row.error(name, f"{row.text(name)!r} is not in {config.train_data}; give another --out")
    return {row.fields["id"]: row.fields for row in rows}


def verdict(row: Mapping, chosen: Filter, rule: str, threshold: float | None) -> dict:
    """The line with "kept" and "reason" by a rule."""
    reason = UNREADABLE if "error" in row else chosen.rules[rule](row, threshold)
    return {**row, "kept": reason is None, "reason": reason}


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_suffix(".part")
    write(part)
    part.replace(path)


def summary(samples: Sequence[Sample], rows: Sequence[Mapping]) -> str:
    """How many samples are kept and why others are not, with the means of Zoom-Zero's Table 7, as text."""
    kept = [sample for sample, row in zip(samples, rows, strict=True) if row["kept"]]
    lines = [("", "samples", "video, s", "evidence, s")]
    for name, some in (("read", samples), ("kept", kept)):
        durations = [sample.duration for sample in some if sample.duration]
        evidence = [sum(end - start for start, end in merge(list(s.spans))) for s in some if s.spans]
        lines.append((name, str(len(some)), *(f"{fmean(v):.1f}" if v else "-" for v in (durations, evidence))))
    lines += [(f"dropped: {reason}", str(n)) for reason, n in Counter(r["reason"] for r in rows).items() if reason]
    errors = [f"the first unreadable video: {row['error']}" for row in rows if "error" in row][:1]
    return "\n".join([evaluate.aligned(lines), *errors])


def run(
    name: str, rule: str, threshold: float | None, out: Path, config: Config, accelerator: Accelerator, skip: bool
) -> None:
    """Measure what is not measured yet; write verdicts and the kept samples. `skip`: without those whose video is
    missing. Raises DataError.
    """
    chosen = FILTERS[name]
    with accelerator.main_process_first():
        samples = world.load_samples(config.train_data, "train", config)
    check_samples(samples, chosen.needed, config.train_data)
    settings = {n: getattr(config, n) for n in (*DECISIVE, "model", "seed", "group_size", "temperature")}
    made_with = {"filter": name, **(settings if chosen.asks else {})}
    path, training = out / "verdicts.jsonl", out / "train.jsonl"
    done = finished(path, samples, made_with, config, accelerator)
    rest = [sample for sample in samples if sample.id not in done]
    if chosen.asks and rest:
        there = {sample.id for sample in data.check_videos(rest, skip)}
        samples = [sample for sample in samples if sample.id in done or sample.id in there]
    measure_all(chosen, samples, done, path, made_with, config, accelerator)
    done = finished(path, samples, made_with, config, accelerator)
    if accelerator.is_main_process:
        rows = [verdict(done[sample.id], chosen, rule, threshold) for sample in samples]
        save(path, lambda part: part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)))
        training.unlink(missing_ok=True)
        print(f"{name}, {rule}:\n{summary(samples, rows)}")
        kept = [sample for sample, row in zip(samples, rows, strict=True) if row["kept"]]
        if not kept:
            raise DataError(f"{training}: not written, since no sample is kept; {path} has the reasons")
        save(training, partial(data.save, samples=[replace(s, video=identity(s, config)["video"]) for s in kept]))
        print(f"{training}: the kept samples; {path}: a line for each")


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The options that only filters.py has."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    own.add_argument("filter", nargs="?", choices=FILTERS, help="which filter")
    own.add_argument("--rule", help="the rule by which samples are dropped (default: paper)")
    own.add_argument("--threshold", type=float, help="stage2: Eq. 6's delta (default 0.1); qvhighlights: seconds (120)")
    own.add_argument("--out", help="folder of what is left behind (default: runs/filters/FILTER)")
    own.add_argument("--skip_missing", action="store_true", help="leave out samples whose video file is missing")
    return own


def main(arguments: list[str] | None = None) -> None:
    given, config = configuration.parse_for_model(parser(), arguments)
    if given.filter is None:
        raise ConfigError(f"which filter? {', '.join(FILTERS)}")
    chosen = FILTERS[given.filter]
    rule = given.rule or "paper"
    if rule not in chosen.rules:
        raise ConfigError(f"--rule of {given.filter} is one of {', '.join(chosen.rules)}, not {rule!r}")
    if given.threshold is not None and (chosen.threshold is None or not given.threshold >= 0):
        raise ConfigError(f"--threshold {given.threshold}: stage2 and qvhighlights take one, not negative")
    threshold = chosen.threshold if given.threshold is None else given.threshold
    disable_progress_bar()  # of loading weights
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(given.out or f"runs/filters/{given.filter}")
    run(given.filter, rule, threshold, out, config, evaluate.patient_accelerator(config), given.skip_missing)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        main()
    except (ConfigError, DataError, ModelError, OSError) as error:
        sys.exit(f"error: {error}")
