"""Evaluation of a policy: answers and spans for every question, and the tables of scores.

    python evaluate.py --model runs/cpu_world/checkpoint            # the built-in benchmark's test split
    python evaluate.py --model MODEL --data_format nextgqa --test_data test.csv --video_root videos/
    python evaluate.py --results baseline.jsonl ours.jsonl --data_format nextgqa --test_data test.csv   # no model runs

With a model: one greedy response per question in the coarse pass, then a zoom on the spans it names. With
`eval_controls` two controls are added: the same videos with questions that belong to other videos (a policy that
grounds falls to chance, one that ignores the question does not), and the zoom on the true spans (the most that better
spans can bring). With `--results`: the result files of this program or of infer.py are scored; "accuracy" is that of
their "predicted_answer". Two results are compared by a paired test.

Scores are those of report/scores.py: ours, with 95% intervals over videos, and the benchmark's official ones if it has
any. `--out` (runs/evaluate) gets them as evaluation.json, the rows as results-LABEL.jsonl, a page with a line per
question, evaluation.html, clue.png (Zoom-Zero's Figure 3), and reliability.png (accuracy against confidence).

A question whose video cannot be read stays in the data set as unanswered: no answer, no span, not well-formed. It is
named in the log, its row has the "error", and the table says how many there are. Video files that are missing are
listed before the model is loaded; `--skip_missing` leaves their questions out.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("evaluate", __doc__)  # the imports below take seconds

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

import config as configuration
from annotations.rows import DataError, Sample
from annotations.samples import check_samples, check_videos, load_samples
from config import Config
from engine.loading import load
from engine.sharding import whole_weights
from episodes import environments
from harness.checkpoints import SCORES
from harness.folder import delete
from harness.journal import save_whole
from harness.run import finish, patient_accelerator, program, share
from media.file import VideoError
from policy import ModelError, Vocabulary
from prompts import TEMPLATES
from report import ReportError, tables
from report.calibration import calibration
from report.evaluation import evaluation_page, page_videos
from report.intervals import bootstrap
from report.plots import plot_by_clue, plot_reliability
from report.results import read_results, row_of, stored_rows, write_results
from report.scores import BORDERS, breakdown, by_kind, overall, score
from rewards import format_reward
from rollout import View, answer_clips, roll_out, view_video, zoom_clips, zoom_pass

log = logging.getLogger("zoomgrpo")


def evaluate(
    model, samples: Sequence[Sample], config: Config, vocabulary: Vocabulary, accelerator: Accelerator, label: str
) -> list[dict]:
    """One row per sample, as report/scores.py has them, with "zoom_answer", "zoom_confidence", "format", "response",
    "error" (of an unreadable video, or None) and, with controls, "shuffled_spans" and "true_zoom_answer"; of episodes,
    COSTS instead.

    Split over processes; every process returns all rows. Raises DataError if no video at all can be read.
    """
    local_numbers = share(samples, accelerator)
    # Controls: each question is asked about the video of another one, half the data set away.
    shift = len(samples) // 2
    rows = []
    bar = tqdm(
        total=len(local_numbers), desc=label, unit="question", disable=None if accelerator.is_main_process else True
    )
    for start in range(0, len(local_numbers), config.eval_batch):
        numbers = local_numbers[start : start + config.eval_batch]
        views, unreadable = view_all([samples[i] for i in numbers], config)
        for error in unreadable.values():
            log.warning("every question about it counts as unanswered: %s", error)
        with torch.no_grad(), accelerator.autocast():
            asked = evaluate_episodes if config.multi_turn else evaluate_views
            chunk = asked(model, views, config, vocabulary)
            if config.eval_controls:
                others = [samples[(i + shift) % len(samples)] for i in numbers if samples[i].video not in unreadable]
                add_controls(chunk, model, views, others, config, vocabulary)
        read = {row["id"]: row for row in chunk}
        for i in numbers:
            row = read.get(samples[i].id) or unanswered(samples[i], str(unreadable[samples[i].video]), config.template)
            rows.append((i, row))
        bar.update(len(numbers))
    bar.close()
    gathered = [row for _, row in sorted(gather_object(rows), key=lambda pair: pair[0])]
    # A process that left right after a gather could deadlock: Gloo's thread still gives the gathered tensors back.
    accelerator.wait_for_everyone()
    if gathered and all(row["error"] for row in gathered):
        raise DataError(f"none of the {len(gathered)} videos can be read; the first: {gathered[0]['error']}")
    return gathered


def load_policy(config: Config, device: torch.device) -> tuple[torch.nn.Module, Vocabulary]:
    """The configured checkpoint on its device; with mixed precision, its weights on a GPU are bfloat16 throughout."""
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    model, tokenizer = load(config.model, torch.bfloat16 if half else torch.float32)
    return model.to(device).eval(), Vocabulary.of(tokenizer, config.outer_tags)


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
                unreadable[sample.video] = error
    return [replace(by_video[s.video], sample=s) for s in samples if s.video in by_video], unreadable


def unanswered(sample: Sample, error: str, template: str) -> dict:
    """The row of a question whose video cannot be read."""
    row = {**row_of(sample, None, None), "format": 0.0, "response": "", "error": error}
    if TEMPLATES[template].multi_turn:
        return row
    return row | {"zoom_answer": None, "zoom_confidence": None, "shuffled_spans": None, "true_zoom_answer": None}


def evaluate_episodes(model, views: Sequence[View], config: Config, vocabulary: Vocabulary) -> list[dict]:
    """A greedy episode for each view, as rows; with how many calls it made, and what it saw. Its "spans" are those of
    its calls: where it has looked."""
    rows = []
    for group in roll_out(model, views, config, vocabulary, None, environments=environments(views, config)):
        [episode] = group.responses
        videos = [video for prompt in group.prompts for video in prompt.videos]
        turns = [turn.text for turn in episode.turns]
        rows.append(
            {
                **row_of(group.view.sample, episode.answer, episode.spans and list(map(list, episode.spans))),
                "format": format_reward(turns, config.template),
                "calls": episode.calls,
                "frames": len(group.view.clip.times) + sum(len(clip.times) for clip in episode.clips),
                "visual_tokens": sum(video.n_tokens for video in videos),
                "response": "\n".join(turns),
                "error": None,
            }
        )
    return rows


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
                **row_of(group.view.sample, response.answer, spans),
                "zoom_answer": response.zoom.answer if response.zoom else None,
                "zoom_confidence": response.zoom.letters.get(response.zoom.answer, 0.0) if response.zoom else None,
                "format": format_reward([response.text], config.template, bool(group.view.sample.options)),
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
            jobs.append((view.sample, zoom_clips(view, [list(view.sample.evidence)], config)[0], None))
            zoomed.append(row)
        except VideoError as error:
            log.warning("sample %s has no zoom on its true spans: %s", view.sample.id, error)
    for row, zoom in zip(zoomed, answer_clips(model, jobs, config, vocabulary), strict=True):
        row["true_zoom_answer"] = zoom.answer


# ---------------------------------------------------------------- what is left behind


def save_and_print(
    results: Mapping[str, list[dict]], out: str | Path, samples: Sequence[Sample], benchmark: str = "records"
) -> None:
    """Print the tables, and write evaluation.json, results-LABEL.jsonl, evaluation.html, clue.png and
    reliability.png into the folder.

    The first result is the baseline of the picture, which is drawn where all evidence has a duration.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    delete(out, SCORES)  # some are not written every time
    numbers = {}
    for label, rows in results.items():
        write_results(out / f"results-{label}.jsonl", rows)
        numbers[label] = {
            "all": overall(rows),
            "intervals": bootstrap(rows),
            "by_kind": by_kind(rows),
            **{f"by_{by}": breakdown(rows, by) for by in BORDERS},
            "calibration": calibration(rows),
            "official": tables.official_scores(rows, benchmark),
        }
    (out / "evaluation.json").write_text(json.dumps(numbers, indent=1))
    questions = {sample.id: sample.question for sample in samples}
    drawn = {label: [{**row, "iou": score(row).get("mIoU")} for row in rows] for label, rows in results.items()}
    table = {
        label: {n: found["all"][n] for n in (*tables.HEADLINE, *tables.CONTROLS) if n in found["all"]}
        for label, found in numbers.items()
    }
    for row in (row for rows in drawn.values() for row in rows):
        row["question"] = questions[row["id"]]
    at = out / "evaluation.html"
    videos = page_videos([sample.video for sample in samples], at)
    evaluation_page(drawn, at, f"{out.name}: {', '.join(drawn)}", table, videos)
    evidence = [row for row in next(iter(drawn.values())) if row["evidence"]]
    if evidence and all(row["duration"] for row in evidence):
        plot_by_clue(drawn, out / "clue.png")
    sure = {f"{label}: {name}": one for label, found in numbers.items() for name, one in found["calibration"].items()}
    if sure:
        plot_reliability(sure, out / "reliability.png")
    print(tables.describe(results, benchmark))


@contextlib.contextmanager
def before_and_after(run: Any, test: Sequence[Sample]) -> Iterator[None]:
    """Evaluate a `setup.Run`'s policy before and after what happens within, print and save both; nothing without
    samples. A resumed run finds the rows before training in its folder.
    """
    if not test:
        yield
        return
    out, accelerator = Path(run.config.out), run.accelerator

    def rows(label: str) -> list[dict]:
        with torch.no_grad(), whole_weights(run.policy):
            return evaluate(run.model, test, run.config, run.vocabulary, accelerator, label)

    path = out / "results-before.jsonl"
    before = stored_before(path, test) if run.config.resume else None
    if before is None:  # of the model that training starts from: its state is loaded later
        before = rows("before training")
        if accelerator.is_main_process:
            save_whole(path, partial(write_results, rows=before))
    yield
    after = rows("after training")
    if accelerator.is_main_process:
        save_and_print({"before": before, "after": after}, out, test, run.config.data_format)


def stored_before(path: Path, test: Sequence[Sample]) -> list[dict] | None:
    """The rows before training that a run has left; None, and why, if they are not whole or about other questions."""
    try:
        rows = stored_rows(path)
    except DataError as error:
        log.warning("%s; the model before training is evaluated anew", error)
        return None
    if [row["id"] for row in rows] != [sample.id for sample in test]:
        log.warning("%s is not about these questions; the model before training is evaluated anew", path)
        return None
    return rows


# ---------------------------------------------------------------- command line


def check_test_samples(samples: Sequence[Sample], config: Config) -> None:
    """Raise DataError for samples that cannot be asked or scored."""
    answered = () if TEMPLATES[config.template].event and not config.eval_controls else ("options", "answer")
    check_samples(samples, (*answered, *(["evidence"] if config.eval_controls else [])), config.test_data)


def main(arguments: list[str] | None = None) -> None:
    options, config = configuration.parse_for_model(commands.extra("evaluate", __doc__), arguments, program="evaluate")
    out = options.out or "runs/evaluate"  # not the recipe's: a run may be there
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.test_data:
        raise configuration.ConfigError("nothing to evaluate on: give --test_data")
    accelerator = patient_accelerator(config)
    with accelerator.main_process_first():
        samples = load_samples(config.test_data, "test", config)
    if not options.results:
        check_test_samples(samples, config)
    if options.skip_missing or not options.results:
        samples = check_videos(samples, options.skip_missing)
    if options.results:
        results = {label: read_results(path, samples) for label, path in labelled(options.results).items()}
    else:
        model, vocabulary = load_policy(config, accelerator.device)
        results = {"policy": evaluate(model, samples, config, vocabulary, accelerator, "evaluating")}
    if accelerator.is_main_process:
        save_and_print(results, out, samples, config.data_format)
        print(f"\n{out}/: evaluation.json, evaluation.html, results-*.jsonl, clue.png, reliability.png")
    finish(accelerator)


def labelled(paths: Sequence[str]) -> dict[str, Path]:
    """Name each file by its stem, with as many of its folders as it takes to tell them apart. Raises ConfigError."""
    files = [Path(path) for path in paths]
    parts = [file.resolve().with_suffix("").parts for file in files]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(names[-depth:]) for names in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, files, strict=True))
    raise configuration.ConfigError(f"--results names a file twice: {', '.join(paths)}")


if __name__ == "__main__":
    program(main, DataError, ModelError, ReportError)
