"""Evaluation of a policy: answers and spans for every question, and the table of scores.

    python evaluate.py --model runs/cpu_world/checkpoint            # the built-in benchmark's test split
    python evaluate.py --config recipes/... --model ... --test_data ...

One greedy response per question in the coarse pass, then a zoom on the spans it names. With `eval_controls` two
controls are added: the same videos with questions that belong to other videos (a policy that grounds falls to chance,
one that ignores the question does not), and the zoom on the true spans (the most that better spans can bring). Scores
are those of metrics.py.

A question whose video cannot be read stays in the data set as unanswered: no answer, no span, not well-formed. It is
named in the log, its row has the "error", and the table says how many there are.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

import config as configuration
import data
import metrics
import world
from config import Config
from data import Sample
from decode import VideoError
from policy import ModelError, Vocabulary, load
from rewards import format_reward, interval_iou
from rollout import View, answer_clips, check_samples, roll_out, view_video, zoom_clips, zoom_pass

log = logging.getLogger("zoomgrpo")

HEADLINE = ("mIoU", "mIoP", "mIoG", "R@0.3", "R@0.5", "accuracy", "zoom_accuracy", "Acc@GQA", "format")


def evaluate(
    model, samples: Sequence[Sample], config: Config, vocabulary: Vocabulary, accelerator: Accelerator, label: str
) -> list[dict]:
    """One row per sample, as metrics.py has them, with "zoom_answer", "format", "response", "error" (of an unreadable
    video, or None) and, with controls, "shuffled_spans" and "true_zoom_answer".

    Split over processes; every process returns all rows. Raises DataError if no video at all can be read.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = list(range(rank, len(samples), world_size))
    # Controls: each question is asked about the video of another one, half the data set away.
    shift = len(samples) // 2
    rows = []
    bar = tqdm(total=len(mine), desc=label, unit="question", disable=None if accelerator.is_main_process else True)
    for start in range(0, len(mine), config.eval_batch):
        numbers = mine[start : start + config.eval_batch]
        views, unreadable = view_all([samples[i] for i in numbers], config)
        with torch.no_grad(), accelerator.autocast():
            chunk = evaluate_views(model, views, config, vocabulary)
            if config.eval_controls:
                others = [samples[(i + shift) % len(samples)] for i in numbers if samples[i].video not in unreadable]
                add_controls(chunk, model, views, others, config, vocabulary)
        read = {row["id"]: row for row in chunk}
        for i in numbers:
            row = read.get(samples[i].id) or unanswered(samples[i], str(unreadable[samples[i].video]))
            rows.append((i, row))
        bar.update(len(numbers))
    bar.close()
    gathered = [row for _, row in sorted(gather_object(rows), key=lambda pair: pair[0])]
    # A process that left right after a gather could deadlock: Gloo's thread still gives the gathered tensors back.
    accelerator.wait_for_everyone()
    if gathered and all(row["error"] for row in gathered):
        raise data.DataError(f"none of the {len(gathered)} videos can be read; the first: {gathered[0]['error']}")
    return gathered


def view_all(samples: Sequence[Sample], config: Config) -> tuple[list[View], dict[str, VideoError]]:
    """The coarse views of the samples whose video can be read, and the other videos' errors.

    A video that several samples share is decoded once.
    """
    by_video: dict[str, View] = {}
    unreadable: dict[str, VideoError] = {}
    for sample in samples:
        if sample.video not in by_video and sample.video not in unreadable:
            try:
                by_video[sample.video] = view_video(sample, config)
            except VideoError as error:
                log.warning("sample %s counts as unanswered: %s", sample.id, error)
                unreadable[sample.video] = error
    return [replace(by_video[s.video], sample=s) for s in samples if s.video in by_video], unreadable


def unanswered(sample: Sample, error: str) -> dict:
    """The row of a question whose video cannot be read."""
    row = {**metrics.row_of(sample, None, None), "zoom_answer": None, "format": 0.0, "response": "", "error": error}
    return row | {"shuffled_spans": None, "true_zoom_answer": None}


def evaluate_views(model, views: Sequence[View], config: Config, vocabulary: Vocabulary) -> list[dict]:
    """Greedy response and zoom for each view, as rows."""
    groups = roll_out(model, views, config, vocabulary, step=None)
    for id, error in zoom_pass(model, groups, config, vocabulary).items():
        log.warning("sample %s has no zoom: %s", id, error)
    rows = []
    for group in groups:
        response = group.responses[0]
        spans = None if response.spans is None else [list(span) for span in response.spans]
        rows.append(
            {
                **metrics.row_of(group.view.sample, response.answer, spans),
                "zoom_answer": response.zoom.answer if response.zoom else None,
                "format": format_reward(response.text, config.template),
                "response": response.text,
                "error": None,
            }
        )
    return rows


def add_controls(
    rows: list[dict], model, views: Sequence[View], others: Sequence[Sample], config: Config, vocabulary: Vocabulary
) -> None:
    """Add "shuffled_spans" (the span claimed for another video's question) and "true_zoom_answer" to the rows."""
    asked = [
        replace(v, sample=replace(v.sample, question=o.question, options=o.options))
        for v, o in zip(views, others, strict=True)
    ]
    for row, group in zip(rows, roll_out(model, asked, config, vocabulary, step=None), strict=True):
        row["shuffled_spans"] = group.responses[0].spans
    jobs, zoomed = [], []
    for row, view in zip(rows, views, strict=True):
        row["true_zoom_answer"] = None
        try:
            jobs.append((view.sample, zoom_clips(view, [list(view.sample.spans)], config)[0], None))
            zoomed.append(row)
        except VideoError as error:
            log.warning("sample %s has no zoom on its true spans: %s", view.sample.id, error)
    for row, (letter, _) in zip(zoomed, answer_clips(model, jobs, config, vocabulary), strict=True):
        row["true_zoom_answer"] = letter


# ---------------------------------------------------------------- scores


def scores(rows: Sequence[dict]) -> dict[str, float]:
    """`metrics.summarise`, with the zoomed accuracy (no zoom counts as wrong), the share of well-formed responses, and
    the controls.

    "shuffled mIoU" is the policy's, asked other videos' questions; "chance mIoU" is that of the evidence of a random
    question about the same video, which a policy that finds events but ignores the question would get.
    """
    result = metrics.summarise(list(rows))
    result["zoom_accuracy"] = mean(row["zoom_answer"] == row["answer"] for row in rows)
    result["format"] = mean(row["format"] for row in rows)
    result["unreadable"] = sum(row["error"] is not None for row in rows)
    if "shuffled_spans" in rows[0]:
        result["true_zoom_accuracy"] = mean(row["true_zoom_answer"] == row["answer"] for row in rows)
        result["shuffled mIoU"] = mean(interval_iou(row["shuffled_spans"] or [], as_spans(row["glue"])) for row in rows)
        result["chance mIoU"] = mean(chance_iou(row, rows) for row in rows)
    return result


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def as_spans(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(start, end) for start, end in pairs]


def chance_iou(row: dict, rows: Sequence[dict]) -> float:
    """Expected IoU of the evidence of a random question about this row's video."""
    return mean(interval_iou(as_spans(o["glue"]), as_spans(row["glue"])) for o in rows if o["video"] == row["video"])


def by_kind(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The same scores for each kind of question."""
    kinds = sorted({row["kind"] for row in rows if row["kind"]})
    return {kind: scores([row for row in rows if row["kind"] == kind]) for kind in kinds}


# ---------------------------------------------------------------- tables


def table(results: dict[str, list[dict]]) -> str:
    """Results side by side as text: the headline scores, then accuracies by kind of question."""
    labels = list(results)
    overall = {label: scores(rows) for label, rows in results.items()}
    controls = [name for name in ("true_zoom_accuracy", "shuffled mIoU", "chance mIoU") if name in overall[labels[0]]]
    width = max(len(label) for label in [*labels, "change"]) + 2
    head = "".join(label.rjust(width) for label in labels) + ("change".rjust(width) if len(labels) == 2 else "")
    lines = [f"{'score':28}{head}"]

    def line(name: str, values: list[float]) -> str:
        change = f"{values[1] - values[0]:+.3f}".rjust(width) if len(values) == 2 else ""
        return f"{name:28}" + "".join(f"{value:.3f}".rjust(width) for value in values) + change

    lines += [line(name, [overall[label][name] for label in labels]) for name in (*HEADLINE, *controls)]
    kinds = {label: by_kind(rows) for label, rows in results.items()}
    for kind in kinds[labels[0]]:
        first = kinds[labels[0]][kind]
        for name in ("mIoU", "accuracy", "zoom_accuracy", "true_zoom_accuracy"):
            if name in first:
                lines.append(
                    line(f"{kind} ({first['questions']}): {name}", [kinds[label][kind][name] for label in labels])
                )
    for label in labels:
        if overall[label]["unreadable"]:
            lines.append(
                f"{label}: {overall[label]['unreadable']} questions count as unanswered, their videos are unreadable"
            )
    return "\n".join(lines)


def save_and_print(results: dict[str, list[dict]], out: str | Path) -> None:
    """Print the table; write it as evaluation.json and the rows as results-LABEL.jsonl into the folder."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {label: {"all": scores(rows), "by_kind": by_kind(rows)} for label, rows in results.items()}
    (out / "evaluation.json").write_text(json.dumps(numbers, indent=1))
    for label, rows in results.items():
        metrics.write_results(out / f"results-{label}.jsonl", rows)
    print(table(results))


def check_test_samples(samples: Sequence[Sample], config: Config) -> None:
    """Raise DataError for samples that cannot be asked or scored."""
    check_samples(samples, ("options", "answer", *(["spans"] if config.eval_controls else [])), config.test_data)


def main(arguments: list[str] | None = None) -> None:
    config = configuration.parse(arguments, description=__doc__.splitlines()[0])
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if not config.test_data:
        raise configuration.ConfigError("nothing to evaluate on: give --test_data")
    with accelerator.main_process_first():
        samples = world.load_samples(config.test_data, "test", config)
    check_test_samples(samples, config)
    model, tokenizer = load(config.model)
    model.to(accelerator.device).eval()
    rows = evaluate(model, samples, config, Vocabulary.of(tokenizer), accelerator, "evaluating")
    if accelerator.is_main_process:
        save_and_print({"policy": rows}, config.out)
        print(f"{config.out}/: evaluation.json, results-policy.jsonl")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        main()
    except (configuration.ConfigError, data.DataError, ModelError) as error:
        sys.exit(f"error: {error}")
