"""Evaluation of a policy: answers and spans for every question, and the tables of scores.

    python evaluate.py --model runs/cpu_world/checkpoint            # the built-in benchmark's test split
    python evaluate.py --model MODEL --data_format nextgqa --test_data test.csv --video_root videos/
    python evaluate.py --results baseline.jsonl ours.jsonl --data_format nextgqa --test_data test.csv   # no model runs

With a model: one greedy response per question in the coarse pass, then a zoom on the spans it names. With
`eval_controls` two controls are added: the same videos with questions that belong to other videos (a policy that
grounds falls to chance, one that ignores the question does not), and the zoom on the true spans (the most that better
spans can bring). With `--results`: the result files of this program or of infer.py are scored; "accuracy" is that of
their "predicted_answer". Two results are compared by a paired test.

Scores are those of metrics.py: ours, with 95% intervals over videos, and the benchmark's official ones if it has any.
`--out` (runs/evaluate) gets them as evaluation.json, the rows as results-LABEL.jsonl, a page with a line per question,
evaluation.html, and clue.png (Zoom-Zero's Figure 3).

A question whose video cannot be read stays in the data set as unanswered: no answer, no span, not well-formed. It is
named in the log, its row has the "error", and the table says how many there are. Video files that are missing are
listed before the model is loaded; `--skip_missing` leaves their questions out.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm import tqdm

import config as configuration
import metrics
import pages
import report
from annotations.rows import DataError, Sample
from annotations.samples import check_samples, check_videos, load_samples
from config import Config
from episodes import roll_out_episodes
from media.source import VideoError
from metrics import COSTS, as_spans
from policy import ModelError, Vocabulary, load
from prompts import EPISODES
from rewards import format_reward, interval_iou, turns_format_reward
from rollout import View, answer_clips, roll_out, view_video, zoom_clips, zoom_pass

log = logging.getLogger("zoomgrpo")

HEADLINE = ("mIoU", "mIoP", "mIoG", "R@0.3", "R@0.5", "R@0.7", "rec@IoU")  # spans
HEADLINE += ("accuracy", "zoom_accuracy", "Acc@GQA", "acc@IoU", "format", *COSTS)
CONTROLS = ("true_zoom_accuracy", "shuffled mIoU", "chance mIoU")


def evaluate(
    model, samples: Sequence[Sample], config: Config, vocabulary: Vocabulary, accelerator: Accelerator, label: str
) -> list[dict]:
    """One row per sample, as metrics.py has them, with "zoom_answer", "format", "response", "error" (of an unreadable
    video, or None) and, with controls, "shuffled_spans" and "true_zoom_answer"; of episodes, metrics.COSTS instead.

    Split over processes; every process returns all rows. Raises DataError if no video at all can be read.
    """
    mine = share(samples, accelerator)
    # Controls: each question is asked about the video of another one, half the data set away.
    shift = len(samples) // 2
    rows = []
    bar = tqdm(total=len(mine), desc=label, unit="question", disable=None if accelerator.is_main_process else True)
    for start in range(0, len(mine), config.eval_batch):
        numbers = mine[start : start + config.eval_batch]
        views, unreadable = view_all([samples[i] for i in numbers], config)
        for error in unreadable.values():
            log.warning("every question about it counts as unanswered: %s", error)
        with torch.no_grad(), accelerator.autocast():
            asked = evaluate_episodes if config.template in EPISODES else evaluate_views
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


def share(samples: Sequence[Sample], accelerator: Accelerator) -> list[int]:
    """The numbers of the samples that this process answers: all questions about every n-th video."""
    number = {video: k for k, video in enumerate(dict.fromkeys(sample.video for sample in samples))}
    rank, n = accelerator.process_index, accelerator.num_processes
    return [i for i, sample in enumerate(samples) if number[sample.video] % n == rank]


def patient_accelerator(config: Config) -> Accelerator:
    """An Accelerator whose processes wait for the slowest one as long as it takes, not ten minutes."""
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=4))
    return Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[patience])


def load_policy(config: Config, device: torch.device) -> tuple[torch.nn.Module, Vocabulary]:
    """The configured checkpoint on its device; with mixed precision, its weights on a GPU are bfloat16 throughout."""
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    model, tokenizer = load(config.model, torch.bfloat16 if half else torch.float32)
    return model.to(device).eval(), Vocabulary.of(tokenizer)


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
    row = {**metrics.row_of(sample, None, None), "format": 0.0, "response": "", "error": error}
    if template in EPISODES:
        return row
    return row | {"zoom_answer": None, "shuffled_spans": None, "true_zoom_answer": None}


def evaluate_episodes(model, views: Sequence[View], config: Config, vocabulary: Vocabulary) -> list[dict]:
    """A greedy episode for each view, as rows; with how many calls it made, and what it saw. Its "spans" are those of
    its calls: where it has looked."""
    rows = []
    for group in roll_out_episodes(model, views, config, vocabulary, step=None):
        [episode] = group.responses
        videos = [
            video for prompt in (group.prompt, *(o.prompt for o in episode.observations)) for video in prompt.videos
        ]
        turns = [turn.text for turn in episode.turns]
        rows.append(
            {
                **metrics.row_of(group.view.sample, episode.answer, episode.spans and list(map(list, episode.spans))),
                "format": turns_format_reward(turns, config.template),
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
                **metrics.row_of(group.view.sample, response.answer, spans),
                "zoom_answer": response.zoom.answer if response.zoom else None,
                "format": format_reward(response.text, config.template, bool(group.view.sample.options)),
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


# ---------------------------------------------------------------- scores


def scores(rows: Sequence[dict]) -> dict[str, float]:
    """`metrics.summarise`, with the number of unreadable videos' questions and, with controls, "chance mIoU".

    "shuffled mIoU" is the policy's, asked other videos' questions; "chance mIoU" is that of the evidence of a random
    question about the same video, which a policy that finds events but ignores the question would get.
    """
    result = metrics.summarise(list(rows))
    result["unreadable"] = sum(row.get("error") is not None for row in rows)
    if "shuffled mIoU" in result:
        result["chance mIoU"] = mean(chance_iou(row, rows) for row in rows if row["glue"])
    return result


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def chance_iou(row: dict, rows: Sequence[dict]) -> float:
    """Expected IoU of the evidence of a random question about this row's video."""
    return mean(interval_iou(as_spans(o["glue"]), as_spans(row["glue"])) for o in rows if o["video"] == row["video"])


def by_kind(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The same scores for each kind of question; one of several kinds counts under each."""
    kinds = sorted({kind for row in rows if row["kind"] for kind in metrics.groups_of(row, "kind")})
    return {kind: scores([row for row in rows if kind in metrics.groups_of(row, "kind")]) for kind in kinds}


# ---------------------------------------------------------------- tables


def table(results: Mapping[str, list[dict]]) -> str:
    """Results side by side as text: the scores with their 95% intervals, then accuracies by kind of question.

    Between two results, the change, its interval and the p-value of `metrics.paired_test`.
    """
    labels = list(results)
    overall = {label: scores(rows) for label, rows in results.items()}
    between = {label: metrics.bootstrap(rows) for label, rows in results.items()}
    compared = list(results.values()) if len(results) == 2 else None
    lines = [("score", *labels, *(["change"] if compared else []))]
    for name in (*HEADLINE, *CONTROLS):
        if name not in overall[labels[0]]:
            continue
        cells = [figure(overall[label].get(name), between[label].get(name)) for label in labels]
        if compared and all(name in intervals for intervals in between.values()):
            both = compared
            if name in COSTS:  # of which an unreadable video has none
                ids = set.intersection(*({row["id"] for row in rows if name in row} for rows in compared))
                both = [[row for row in rows if row["id"] in ids] for rows in compared]
            test = metrics.paired_test(both[1], both[0], name)
            cells.append(f"{figure(test['difference'], (test['low'], test['high']), '+')} p = {test['p_value']:.4f}")
        lines.append((name, *cells))
    kinds = {label: by_kind(rows) for label, rows in results.items()}
    for kind, ours in kinds[labels[0]].items():
        for name in ("mIoU", "accuracy", "zoom_accuracy", "true_zoom_accuracy", *COSTS):
            if name in ours:
                values = [kinds[label][kind].get(name) for label in labels]
                change = [f"{values[1] - values[0]:+.3f}"] if compared and None not in values else []
                lines.append((f"{kind} ({ours['questions']}): {name}", *map(figure, values), *change))
    text = aligned(lines)
    for label, found in overall.items():
        text += f"\n{label}: {found['questions']} questions, {found['unanswered']} unanswered"
        text += f", {found['without_span']} without a span"
        if found["unreadable"]:
            text += f"; {found['unreadable']} of them count as unanswered because their videos are unreadable"
    return text


def figure(value: float | None, interval: tuple[float, float] | None = None, sign: str = "") -> str:
    """0.971 [0.96, 0.98]"""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f" [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]" if interval else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, in columns."""
    n = max(map(len, lines))
    full = [[*line, *[""] * (n - len(line))] for line in lines]
    widths = [max(len(line[k]) for line in full) for k in range(n)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in full
    )


def clue_table(results: Mapping[str, list[dict]]) -> str:
    """mIoU and accuracy by the length of the evidence and by its portion of the video (Zoom-Zero, Figure 3)."""
    lines = [("evidence", "questions", *(f"{label}: {name}" for label in results for name in ("mIoU", "accuracy")))]
    for by in ("clue_length", "clue_portion"):
        groups = {label: metrics.breakdown(rows, by) for label, rows in results.items()}
        for name, ours in next(iter(groups.values())).items():
            cells = [figure(found[name].get(score)) for found in groups.values() for score in ("mIoU", "accuracy")]
            unit = " of the video" if by == "clue_portion" and name != "unknown" else ""
            lines.append((name + unit, str(ours["questions"]), *cells))
    return aligned(lines)


def official_scores(rows: list[dict], benchmark: str) -> dict:
    """The benchmark's own scores; {} if it has none, and the reason if it cannot score these rows."""
    if benchmark not in metrics.OFFICIAL:
        return {}
    try:
        return metrics.official(benchmark, rows)
    except DataError as error:
        return {"not scored": str(error)}


def official_text(found: dict, path: str = "") -> str:
    """Nested scores as lines: one for each innermost dict."""
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    figures = ", ".join(f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in flat.items())
    nested = [official_text(value, f"{path} {name}") for name, value in found.items() if isinstance(value, dict)]
    return "\n".join([*([f"{path}  {figures}"] if flat else []), *nested])


def describe(results: Mapping[str, list[dict]], benchmark: str) -> str:
    """All tables as text."""
    parts = [table(results)]
    if any(row["glue"] for rows in results.values() for row in rows):
        parts.append(clue_table(results))
    for label, rows in results.items():
        found = official_scores(rows, benchmark)
        if found:
            parts.append(f"{benchmark}'s official scores of {label}\n{official_text(found)}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- what is left behind


def save_and_print(
    results: Mapping[str, list[dict]], out: str | Path, samples: Sequence[Sample], benchmark: str = "records"
) -> None:
    """Print the tables, and write evaluation.json, results-LABEL.jsonl, evaluation.html and clue.png into the folder.

    The page shows the rows of the last result; the first one is the baseline of the picture, which is drawn where all
    evidence has a duration.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {}
    for label, rows in results.items():
        metrics.write_results(out / f"results-{label}.jsonl", rows)
        numbers[label] = {
            "all": scores(rows),
            "intervals": metrics.bootstrap(rows),
            "by_kind": by_kind(rows),
            **{f"by_{by}": metrics.breakdown(rows, by) for by in ("clue_length", "clue_portion")},
            "official": official_scores(rows, benchmark),
        }
    (out / "evaluation.json").write_text(json.dumps(numbers, indent=1))
    questions = {sample.id: sample.question for sample in samples}
    drawn = {label: [{**row, "iou": metrics.score(row).get("mIoU")} for row in rows] for label, rows in results.items()}
    shown = {
        label: {n: found["all"][n] for n in (*HEADLINE, *CONTROLS) if n in found["all"]}
        for label, found in numbers.items()
    }
    *_, (last, rows) = drawn.items()
    rows = [{**row, "question": questions[row["id"]], "video": Path(row["video"]).name} for row in rows]
    pages.evaluation_page(rows, out / "evaluation.html", f"{out.name}: {last}", shown)
    evidence = [row for row in rows if row["glue"]]
    if evidence and all(row["duration"] for row in evidence):
        report.plot_by_clue(drawn, out / "clue.png")
    print(describe(results, benchmark))


# ---------------------------------------------------------------- command line


def check_test_samples(samples: Sequence[Sample], config: Config) -> None:
    """Raise DataError for samples that cannot be asked or scored."""
    answered = () if config.template == "longvtg_r1" and not config.eval_controls else ("options", "answer")
    check_samples(samples, (*answered, *(["evidence"] if config.eval_controls else [])), config.test_data)


def parser() -> argparse.ArgumentParser:
    """The options that only evaluate.py has."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    own.add_argument("--results", nargs="+", metavar="FILE", help="score these result files instead of a model")
    own.add_argument("--out", help="folder of what is left behind (default: runs/evaluate)")
    own.add_argument("--skip_missing", action="store_true", help="leave out questions whose video file is missing")
    return own


def main(arguments: list[str] | None = None) -> None:
    given, config = configuration.parse_for_model(parser(), arguments)
    out = given.out or "runs/evaluate"  # not the recipe's: a run may be there
    if config.threads:
        torch.set_num_threads(config.threads)
    if not config.test_data:
        raise configuration.ConfigError("nothing to evaluate on: give --test_data")
    accelerator = patient_accelerator(config)
    with accelerator.main_process_first():
        samples = load_samples(config.test_data, "test", config)
    if not given.results:
        check_test_samples(samples, config)
    if given.skip_missing or not given.results:
        samples = check_videos(samples, given.skip_missing)
    if given.results:
        results = {label: metrics.read_results(path, samples) for label, path in labelled(given.results).items()}
    else:
        model, vocabulary = load_policy(config, accelerator.device)
        results = {"policy": evaluate(model, samples, config, vocabulary, accelerator, "evaluating")}
    if accelerator.is_main_process:
        save_and_print(results, out, samples, config.data_format)
        print(f"\n{out}/: evaluation.json, evaluation.html, results-*.jsonl, clue.png where there is evidence")


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
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        main()
    except (configuration.ConfigError, DataError, ModelError, report.ReportError) as error:
        sys.exit(f"error: {error}")
