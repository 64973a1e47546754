"""Which samples are worth training on: Zoom-Zero's filter between its two stages, and its checks of two data sets.

    accelerate launch filters.py stage2 --model runs/zoom_zero_stage1/checkpoint --train_data stage1.jsonl --out DIR
    accelerate launch filters.py plm_video --model CHECKPOINT --train_data plm.jsonl --out DIR
    python filters.py qvhighlights --data_format qvhighlights --train_data highlight_train_release.jsonl --out DIR

| filter       | what is measured                               | `paper` (Appendix A): drop a sample if               |
|--------------|------------------------------------------------|------------------------------------------------------|
| stage2       | accuracy and IoU of G sampled responses        | all are correct, or max IoU - mean IoU < 0.1 (Eq. 6) |
| plm_video    | the answer from the whole video, from the clue | only the one from the clue is correct                |
| qvhighlights | the video's length                             | it is not above 120 s                                |

Other rules, by `--rule`:

- stage2, `released`: the released code keeps a sample if (delta > 0.1 or min IoU > 0) and not all answers are correct.
- plm_video, `sufficient`: drop a sample if the answer from the clue is wrong. The paper says that its check "ensures
  that the clue duration indeed provides sufficient information", but the rule it prints keeps what is answered from
  neither, and drops what is answered from the clue alone.

The paper does not say who answers in plm_video. Here it is `--model`, or `--judge_model` at a chat `--endpoint`, twice
with the prompt of the zoom pass: from the frames of the coarse pass, and from those of a zoom on the true spans.

`--out` gets verdicts.jsonl, a line per sample with its numbers, "kept" and "reason", and train.jsonl, the kept samples.
What has a line is not measured again (until it is deleted): an interrupted run goes on, and a finished one applies
another `--rule` or `--threshold` without a model. Samples are measured in batches that depend on the data alone, and
sampling is seeded per sample, so neither the number of processes nor an interruption changes a result.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("filters", __doc__)  # the imports below take seconds

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import config as configuration
import prompts
from annotations.rows import DataError, Sample
from annotations.samples import check_samples, check_videos, load_samples, write_samples
from config import Config, ConfigError, suiting_recipe
from harness import journal
from harness.asking import Agent
from harness.batches import view_all
from harness.chat import Cached, Chat, ChatError, Message, RequestError, Shown, connect
from harness.folder import claimed
from harness.run import patient_accelerator, program
from infer import load_agent
from media.decode import probe
from media.file import VideoError
from media.prefetch import prefetch
from policy import ModelError
from report.tables import aligned
from rewards import accuracy_reward, iou_reward, merge
from rollout import View, answer_clips, roll_out, zoom_clips
from video import Clip

AT_ONCE = 8  # requests to an endpoint
ROUNDING = 1e-9  # an IoU of 0.3 against a mean of 0.2 is 0.1 above it, whatever floats say
NOT_MEASURED = "not measured"  # the line's "error" says why


# ---------------------------------------------------------------- the rules


def iou_delta(ious: Sequence[float]) -> float:
    """How far the best response's IoU is above the mean (Zoom-Zero, Eq. 6)."""
    # Eq. 6: δ = max_i IoU_i - 1/n Σ_i IoU_i
    return max(ious) - fmean(ious)


def stage2_paper(row: Mapping, threshold: float) -> str | None:
    """Why a sample has nothing to teach, or None (Zoom-Zero, Appendix A)."""
    return rule_reasons(row, row["delta"] > threshold - ROUNDING, f"delta < {threshold:g}")


def stage2_released(row: Mapping, threshold: float) -> str | None:
    """The same in the released code, where spans that all overlap the evidence are enough."""
    signal = row["delta"] > threshold + ROUNDING or min(row["ious"]) > 0
    return rule_reasons(row, signal, f"delta <= {threshold:g} and an IoU of 0")


def rule_reasons(row: Mapping, signal: bool, otherwise: str) -> str | None:
    """All that speaks against a sample: only correct answers, and no signal in the spans."""
    found = ["all correct"] if min(row["accuracies"], default=0) == 1 else []
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
    """Accuracy (none without options and answer) and IoU of G responses to each question, and Eq. 6."""
    rows = []
    for group in roll_out(policy.model, views, policy.config, policy.vocabulary, step=0):
        sample = group.view.sample
        ious = [iou_reward(response.spans, list(sample.evidence)) for response in group.responses]
        answers = [response.answer for response in group.responses] if sample.options and sample.answer else []
        accuracies = [accuracy_reward(answer, sample.answer) for answer in answers]
        rows.append({"accuracies": accuracies, "ious": ious, "delta": iou_delta(ious)})
    return rows


@dataclass(frozen=True)
class Judge:
    """Whoever answers in the policy's place, and how it is shown videos."""

    chat: Chat
    config: Config


def measure_clues(asked: Agent | Judge, views: Sequence[View]) -> list[dict]:
    """The letters answered from the whole video and from its true spans alone."""
    clues: list[Clip | VideoError] = []
    for view in views:
        try:
            clues += zoom_clips(view, [list(view.sample.evidence)], asked.config)
        except VideoError as error:
            clues.append(error)
    view_clips = [
        (v, clip) for v, clue in zip(views, clues, strict=True) if isinstance(clue, Clip) for clip in (v.clip, clue)
    ]
    letters = iter(ask_judge(asked, view_clips) if isinstance(asked, Judge) else ask_policy(asked, view_clips))
    rows = []
    for view, clue in zip(views, clues, strict=True):
        replies = [next(letters), next(letters)] if isinstance(clue, Clip) else [clue]
        errors = [str(one) for one in replies if isinstance(one, Exception)]
        names = ("whole_answer", "clue_answer")
        answered = {"answer": view.sample.answer, **dict(zip(names, replies, strict=False))}
        rows.append({"error": errors[0]} if errors else answered)
    return rows


def ask_policy(agent: Agent, view_clips: Sequence[tuple[View, Clip]]) -> list[str | None]:
    """The letter that the policy answers to each view's question, shown a clip; None is unreadable."""
    jobs = [(view.sample, clip, None) for view, clip in view_clips]
    return [zoom.answer for zoom in answer_clips(agent.model, jobs, agent.config, agent.vocabulary)]


def ask_judge(judge: Judge, view_clips: Sequence[tuple[View, Clip]]) -> list[str | RequestError | None]:
    """The same of a judge, who may refuse a request. Raises ChatError if there is no use in going on."""

    def ask(view: View, clip: Clip) -> str | RequestError | None:
        sample = view.sample
        words = prompts.zoom_text("zoom_zero", sample.question, list(sample.options))
        frames = Shown(sample.video, (0.0, view.info.duration), clip)
        try:
            return prompts.parse_answer(judge.chat.reply([Message("user", (frames, words))]).text, bare=True)
        except RequestError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda one: ask(*one), view_clips))


def with_durations(samples: Sequence[Sample], config: Config) -> tuple[list[Sample], dict[str, VideoError]]:
    """The samples with the durations of their videos in seconds, and the errors of videos that cannot be read."""
    known, unreadable = [], {}
    for sample in samples:
        try:
            known.append(replace(sample, duration=sample.duration or probe(sample.video).duration))
        except VideoError as error:
            unreadable[sample.video] = error
    return [sample for sample in known if sample.video not in unreadable], unreadable


def measure_durations(_: None, samples: Sequence[Sample]) -> list[dict]:
    """Durations in seconds."""
    return [{"duration": sample.duration} for sample in samples]


@dataclass(frozen=True)
class Filter:
    """One filter: what a sample must have, how samples are measured, and its rules with their threshold's default."""

    needed: tuple[str, ...]
    measure: Callable[[Agent | Judge | None, list], list[dict]]
    rules: dict[str, Callable[[Mapping, float | None], str | None]]
    threshold: float | None
    asks: bool  # a model or a judge is needed


FILTERS = {
    "stage2": Filter(
        ("options", "answer", "evidence"),
        measure_responses,
        {"paper": stage2_paper, "released": stage2_released},
        0.1,
        True,
    ),
    "plm_video": Filter(
        ("options", "answer", "evidence"),
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
    *,
    path: Path,
    made_with: dict,
    config: Config,
    accelerator: Accelerator,
    load: Callable[[], Agent | Judge],
) -> None:
    """Add a line to the journal `path` for each sample that is not done, asking what `load` returns. Split over
    processes by batches.

    A batch is always measured whole: rounding, and with it the last digit of a probability, depends on its company.
    """
    size = config.rollout_batch
    batches = [samples[k : k + size] for k in range(0, len(samples), size)]
    rest = [batch for batch in batches if any(sample.id not in done for sample in batch)]
    if not rest:
        return
    asked = load() if chosen.asks else None
    read = view_all if chosen.asks else with_durations
    local_batches = rest[accelerator.process_index :: accelerator.num_processes]
    bar_options = {"desc": f"{path}: {len(done)} done", "disable": None if accelerator.is_main_process else True}
    with (
        prefetch(partial(read, batch, config) for batch in local_batches) as ahead,
        tqdm(total=sum(map(len, local_batches)), unit="sample", **bar_options) as bar,
    ):
        for batch, (readable, unreadable) in zip(local_batches, ahead, strict=True):
            with torch.no_grad(), accelerator.autocast():
                measured = iter(chosen.measure(asked, readable))
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


def finished_rows(
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
    reason = NOT_MEASURED if "error" in row else chosen.rules[rule](row, threshold)
    return {**row, "kept": reason is None, "reason": reason}


def filter_summary(samples: Sequence[Sample], rows: Sequence[Mapping]) -> str:
    """How many samples are kept and why others are not, with the means of Zoom-Zero's Table 7, as text."""
    kept = [sample for sample, row in zip(samples, rows, strict=True) if row["kept"]]
    lines = [("", "samples", "video, s", "evidence, s")]
    for name, subset in (("read", samples), ("kept", kept)):
        durations = [sample.duration for sample in subset if sample.duration]
        evidence = [sum(end - start for start, end in merge(list(s.evidence))) for s in subset if s.evidence]
        lines.append((name, str(len(subset)), *(f"{fmean(v):.1f}" if v else "-" for v in (durations, evidence))))
    lines += [(f"dropped: {reason}", str(n)) for reason, n in Counter(r["reason"] for r in rows).items() if reason]
    errors = [f"the first error: {row['error']}" for row in rows if "error" in row][:1]
    return "\n".join([aligned(lines), *errors])


def run(
    options: argparse.Namespace, rule: str, threshold: float | None, config: Config, accelerator: Accelerator
) -> None:
    """Measure what is not measured yet, write verdicts and kept samples. Raises DataError, ModelError, ChatError."""
    chosen, out = FILTERS[options.filter], Path(options.out)
    with accelerator.main_process_first():
        samples = load_samples(config.train_data, "train", config)
    events = options.filter == "stage2" and prompts.TEMPLATES[config.template].event  # the template asks for events too
    check_samples(samples, ("evidence",) if events else chosen.needed, config.train_data)
    sampled = {name: getattr(config, name) for name in ("model", "seed", "group_size", "temperature")}
    settings = configuration.decisive(config) | sampled
    if options.judge_model:
        settings["model"] = f"{options.judge_model} at an endpoint"
    made_with = {"filter": options.filter, **(settings if chosen.asks else {})}
    path, training = out / "verdicts.jsonl", out / "train.jsonl"
    done = finished_rows(path, samples, made_with, config, accelerator)
    rest = [sample for sample in samples if sample.id not in done]
    if chosen.asks and rest:
        there = {sample.id for sample in check_videos(rest, options.skip_missing)}
        samples = [sample for sample in samples if sample.id in done or sample.id in there]
    load = (
        partial(load_judge, options, out, config)
        if options.judge_model
        else partial(load_agent, config, accelerator.device)
    )
    run_with = {"config": config, "accelerator": accelerator, "load": load}
    measure_all(chosen, samples, done, path=path, made_with=made_with, **run_with)
    done = finished_rows(path, samples, made_with, config, accelerator)
    if accelerator.is_main_process:
        rows = [verdict(done[sample.id], chosen, rule, threshold) for sample in samples]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        journal.save_whole(path, lambda part: part.write_text(lines, encoding="utf-8"))
        training.unlink(missing_ok=True)
        print(f"{options.filter}, {rule}:\n{filter_summary(samples, rows)}")
        kept = [sample for sample, row in zip(samples, rows, strict=True) if row["kept"]]
        if not kept:
            raise DataError(f"{training}: not written, since no sample is kept; {path} has the reasons")
        kept = [replace(sample, video=identity(sample, config)["video"]) for sample in kept]
        journal.save_whole(training, partial(write_samples, samples=kept))
        print(f"{training}: the kept samples; {path}: a line for each")


def load_judge(options: argparse.Namespace, out: Path, config: Config) -> Judge:
    """Who answers at the endpoint; the replies are kept in the folder. Raises ChatError naming what is missing."""
    return Judge(Cached(connect(options.endpoint, options.judge_model), out / "replies"), config)


# ---------------------------------------------------------------- command line


def recipe(options: argparse.Namespace) -> Path:
    """A judge is shown videos by the paper's values for long videos, the policy as suits it."""
    return (
        configuration.RECIPES / "long_video.yaml"
        if options.judge_model
        else suiting_recipe(options.model, options.data_format)
    )


def main(arguments: list[str] | None = None) -> None:
    options, config = configuration.parse_for_model(commands.extra("filters", __doc__), arguments, recipe, "filters")
    if options.filter is None:
        raise ConfigError(f"which filter? {', '.join(FILTERS)}")
    chosen = FILTERS[options.filter]
    rule = options.rule or "paper"
    if rule not in chosen.rules:
        raise ConfigError(f"--rule of {options.filter} is one of {', '.join(chosen.rules)}, not {rule!r}")
    if options.filter == "stage2" and config.multi_turn:
        raise ConfigError(
            f"stage2 is about responses of one turn, and those of template = {config.template} have several"
        )
    if options.threshold is not None and (chosen.threshold is None or not options.threshold >= 0):
        raise ConfigError(f"--threshold {options.threshold}: stage2 and qvhighlights take one, not negative")
    if (options.endpoint or options.judge_model) and not (options.filter == "plm_video" and options.judge_model):
        raise ConfigError("--judge_model, at an --endpoint, is for plm_video; an endpoint needs a model's name")
    disable_progress_bar()  # of loading weights
    options.out = options.out or f"runs/filters/{options.filter}"
    accelerator = patient_accelerator(config)
    with claimed(options.out, accelerator):
        run(options, rule, chosen.threshold if options.threshold is None else options.threshold, config, accelerator)


if __name__ == "__main__":
    program(main, DataError, ModelError, ChatError)
