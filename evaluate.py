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
import prompts
from annotations.rows import DataError, Sample
from annotations.samples import check_samples, check_videos, load_samples
from config import Config
from engine.loading import load
from engine.sharding import whole_weights
from harness.asking import FRAME_BYTES, Agent, Request, Steps, side_by_side, whole_video, zoomed
from harness.checkpoints import SCORES, keep_best
from harness.folder import claimed, delete
from harness.journal import save_whole
from harness.publish import write_card
from harness.run import finish, main_does, main_reads, patient_accelerator, program, share
from media.file import VideoError
from media.frames import FrameCache
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
from rollout import visible_spans

log = logging.getLogger("zoomgrpo")


def evaluate(
    model,
    samples: Sequence[Sample],
    config: Config,
    vocabulary: Vocabulary,
    accelerator: Accelerator,
    label: str,
    frames: FrameCache | None = None,
) -> list[dict]:
    """One row per sample, as report/scores.py has them, with "zoom_answer", "zoom_confidence", "format", "response",
    "error" (of an unreadable video, or None) and, with controls, "shuffled_spans" and "true_zoom_answer"; of episodes,
    COSTS instead.

    Split over processes; every process returns all rows. `frames`: those of an evaluation of the same questions, which
    are not decoded again. Raises DataError if no video at all can be read.
    """
    local_numbers = share(samples, accelerator)
    agent = Agent(model, vocabulary, config, FrameCache(FRAME_BYTES) if frames is None else frames)
    steps = episode_row if config.multi_turn else two_pass_row
    # Controls: each question is asked about the video of another one, half the data set away.
    others = [samples[(i + len(samples) // 2) % len(samples)] if config.eval_controls else None for i in local_numbers]
    questions = ((i, steps(agent, samples[i], other)) for i, other in zip(local_numbers, others, strict=True))
    rows, named = [], set()
    quiet = None if accelerator.is_main_process else True
    with tqdm(total=len(local_numbers), desc=label, unit="question", disable=quiet) as bar:
        for i, row, _ in side_by_side(questions, config.eval_batch, accelerator.autocast):
            if isinstance(row, VideoError):
                if samples[i].video not in named:
                    log.warning("every question about it counts as unanswered: %s", row)
                    named.add(samples[i].video)
                row = unanswered(samples[i], str(row), config.template)
            rows.append((i, row))
            bar.update()
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


def unanswered(sample: Sample, error: str, template: str) -> dict:
    """The row of a question whose video cannot be read."""
    row = {**row_of(sample, None, None), "format": 0.0, "response": "", "error": error}
    if TEMPLATES[template].multi_turn:
        return row
    return row | {"zoom_answer": None, "zoom_confidence": None, "shuffled_spans": None, "true_zoom_answer": None}


def episode_row(agent: Agent, sample: Sample, other: None = None) -> Steps:
    """The row of a greedy episode; with how many calls it made, and what it saw. Its "spans" are those of its calls:
    where it has looked."""
    [group] = yield [whole_video(agent, sample)]
    [episode] = group.responses
    videos = [video for prompt in group.prompts for video in prompt.videos]
    turns = [turn.text for turn in episode.turns]
    return {
        **row_of(sample, episode.answer, episode.spans and list(map(list, episode.spans))),
        "format": format_reward(turns, agent.config.template),
        "calls": episode.calls,
        "frames": len(group.view.clip.times) + sum(len(clip.times) for clip in episode.clips),
        "visual_tokens": sum(video.n_tokens for video in videos),
        "response": "\n".join(turns),
        "error": None,
    }


def two_pass_row(agent: Agent, sample: Sample, other: Sample | None = None) -> Steps:
    """The row of a greedy response and the zoom on its spans. With another sample, "shuffled_spans" (the span claimed
    for that one's question about this video) and "true_zoom_answer" too.
    """
    config, whole = agent.config, whole_video(agent, sample)
    requests = [whole]
    if other:
        swapped = replace(sample, question=other.question, options=other.options)
        requests.append(replace(whole, show=lambda: replace(whole.view, sample=swapped)))
    groups = yield requests
    [response] = groups[0].responses
    zoom, spans = None, visible_spans(response.spans, whole.view.info.duration)
    if sample.options and (spans or config.invalid_span == "uniform"):
        think = prompts.parse_think(response.text) if config.zoom_sees_think else None
        zoom = yield from zoom_if_readable(zoomed(agent, whole, spans, think), "no zoom")
    claimed = None if response.spans is None else [list(span) for span in response.spans]
    row = {
        **row_of(sample, response.answer, claimed),
        "zoom_answer": zoom.answer if zoom else None,
        "zoom_confidence": zoom.letters.get(zoom.answer, 0.0) if zoom else None,
        "format": format_reward([response.text], config.template, bool(sample.options)),
        "response": response.text,
        "error": None,
    }
    if other:
        row["shuffled_spans"] = groups[1].responses[0].spans
        zoom = yield from zoom_if_readable(zoomed(agent, whole, list(sample.evidence)), "no zoom on its true spans")
        row["true_zoom_answer"] = zoom.answer if zoom else None
    return row


def zoom_if_readable(request: Request, lack: str) -> Steps:
    """The Zoom, or None if its part of the video cannot be read, which the log says."""
    try:
        [zoom] = yield [request]
    except VideoError as error:
        log.warning("sample %s has %s: %s", request.sample.id, lack, error)
        return None
    return zoom


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
def before_and_after(run: Any, test: Sequence[Sample], known: list[dict] | None = None) -> Iterator[None]:
    """Evaluate a `setup.Run`'s policy before and after what happens within, print and save both; nothing without
    samples. The rows before are not made again where they are `known`, or where a resumed run has left them.
    """
    if not test:
        yield
        return
    out, accelerator, frames = Path(run.config.out), run.accelerator, FrameCache(FRAME_BYTES)

    def rows(label: str) -> list[dict]:
        with torch.no_grad(), whole_weights(run.policy):
            return evaluate(run.model, test, run.config, run.vocabulary, accelerator, label, frames)

    path = out / "results-before.jsonl"
    before = stored_before(path, test) if run.config.resume else None
    if before is None:  # of the model that training starts from: its state is loaded later
        before = known or rows("before training")
        if accelerator.is_main_process:
            save_whole(path, partial(write_results, rows=before))
    if frames.n_bytes > FRAME_BYTES // 4:  # too much to hold for as long as a training takes
        frames = FrameCache(FRAME_BYTES)
    yield
    after = rows("after training")
    scores = {"before": headline(before), "after": headline(after)}
    if (best := score_of_best(scores["after"], run.config)) is not None:
        keep_best(run, run.config.steps, best)
    if accelerator.is_main_process:
        save_and_print({"before": before, "after": after}, out, test, run.config.data_format)
        write_card(out / "checkpoint", run.config, scores)


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


def known_before(test: Sequence[Sample], config: Config, accelerator: Accelerator) -> list[dict] | None:
    """The rows of `eval_before`, read before the run's folder is emptied, where they may be; None for a resumed run,
    which has its own. Raises DataError if they are about other questions, or lack what this run evaluates.
    """
    if not config.eval_before or config.resume or not test:
        return None
    rows = main_reads(accelerator, partial(stored_rows, config.eval_before), DataError)
    asked = ("id", "video", "answer", "evidence")
    if [[row.get(k) for k in asked] for row in rows] != [[row_of(s, None, None)[k] for k in asked] for s in test]:
        raise DataError(f"eval_before = {config.eval_before} is not about these questions")
    for name in ("format", *(["true_zoom_answer"] if config.eval_controls else [])):
        if name not in rows[0]:
            raise DataError(f"eval_before = {config.eval_before} has no {name}")
    return rows


def evaluate_at(run: Any, test: Sequence[Sample], step: int) -> float | None:
    """Evaluate a `setup.Run`'s policy on the way: a line, results-STEP.jsonl, and figures for the tracker.

    Returns the score of `keep_best`, None without one. Raises ConfigError if these questions do not have it.
    """
    if not test:
        return None
    with torch.no_grad(), whole_weights(run.policy):
        rows = evaluate(run.model, test, run.config, run.vocabulary, run.accelerator, f"after {step} steps")
    figures = headline(rows)
    run.accelerator.log({f"eval/{name}": value for name, value in figures.items()}, step=step)
    run.accelerator.print(f"after {step} steps: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    path = Path(run.config.out) / f"results-{step}.jsonl"
    main_does(run.accelerator, lambda: save_whole(path, lambda part: write_results(part, rows)))
    return score_of_best(figures, run.config)


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """The scores that are named first, as far as these rows have them."""
    scores = overall(rows)
    return {name: scores[name] for name in tables.HEADLINE if name in scores}


def score_of_best(figures: Mapping[str, float], config: Config) -> float | None:
    """The score of `keep_best`, None without one. Raises ConfigError if these questions do not have it."""
    if config.keep_best and config.keep_best not in figures:
        raise configuration.ConfigError(f"keep_best = {config.keep_best}: these questions have {', '.join(figures)}")
    return figures[config.keep_best] if config.keep_best else None


# ---------------------------------------------------------------- command line


def check_evaluations(samples: Sequence[Sample], config: Config) -> None:
    """What training evaluates: as `check_test_samples`. Raises ConfigError for evaluations that are not made."""
    if config.keep_best and not (config.eval_every and samples):
        needs = "it needs eval_every and test_data"
        raise configuration.ConfigError(f"keep_best = {config.keep_best} compares evaluations on the way: {needs}")
    check_test_samples(samples, config)


def check_test_samples(samples: Sequence[Sample], config: Config) -> None:
    """Raise DataError for samples that cannot be asked or scored."""
    answered = () if TEMPLATES[config.template].event and not config.eval_controls else ("options", "answer")
    check_samples(samples, (*answered, *(["evidence"] if config.eval_controls else [])), config.test_data)


def main(arguments: list[str] | None = None) -> None:
    options, config = configuration.parse_for_model(commands.extra("evaluate", __doc__), arguments, program="evaluate")
    out = options.out or "runs/evaluate"  # not the recipe's: a run may be there
    if not config.test_data:
        raise configuration.ConfigError("nothing to evaluate on: give --test_data")
    accelerator = patient_accelerator(config)
    with accelerator.main_process_first():
        samples = load_samples(config.test_data, "test", config)
    if not options.results:
        check_test_samples(samples, config)
    if options.skip_missing or not options.results:
        samples = check_videos(samples, options.skip_missing)
    # A run's scores are not replaced unasked, nor are answers that took a model.
    kept = ("metrics.jsonl",) if options.results else ("metrics.jsonl", "results-policy.jsonl")
    with claimed(out, accelerator, kept, options.overwrite):
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
