"""Samples: loading them from annotation files or the built-in benchmark, mixtures of files, and what is needed of them.

`read_samples` turns an annotation file into a list of `Sample`, in any format of formats.py. `write_samples` writes our
own. `load_samples` and `load_training` read what a configuration names.

`python -m annotations.samples --format nextgqa --path test.csv --videos DIR` prints what is in a file and which videos
are missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import yaml

import prompts
import world
from annotations.formats import READERS
from annotations.rows import DataError, Report, Sample, as_row, read_text
from config import Config

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts")


# ---------------------------------------------------------------- loading


def read_samples(
    path: str | Path, format: str = "records", video_root: str | Path | None = None, clip_spans: bool = False
) -> list[Sample]:
    """The samples of an annotation file; dropped rows are logged as a warning.

    `format` is a key of READERS. `video_root` is put before relative video paths. `clip_spans` cuts evidence to
    [0, duration] seconds. Raises DataError, naming file, row and field, for a file that cannot be used.
    """
    samples, report = read_with_report(path, format, video_root, clip_spans)
    if report.dropped:
        reasons = Counter(reason for _, reason in report.dropped)
        counts = ", ".join(f"{count} because {reason}" for reason, count in reasons.items())
        logging.getLogger(__name__).warning("%s: %d rows dropped: %s", path, len(report.dropped), counts)
    return samples


def read_with_report(
    path: str | Path, format: str = "records", video_root: str | Path | None = None, clip_spans: bool = False
) -> tuple[list[Sample], Report]:
    """Like `read_samples`, but also returns the Report."""
    if format not in READERS:
        raise DataError(f"unknown format '{format}'; known: {', '.join(READERS)}")
    path = Path(path)
    report = Report(path, format)
    samples, seen = [], set()
    for sample in READERS[format](path, report):
        if not sample.question.strip():
            report.drop(sample.id, "empty question")
            continue
        if sample.id in seen:
            raise DataError(f"{path}: two rows have the id '{sample.id}'")
        seen.add(sample.id)
        note_spans(sample, report)
        evidence = clipped(sample.evidence, sample.duration) if clip_spans else sample.evidence
        samples.append(replace(sample, video=video_path(sample.video, video_root), evidence=evidence))
    if not samples:
        raise DataError(f"{path}: none of the {len(report.dropped)} rows can be used: {report.dropped[:3]}")
    report.kept = len(samples)
    return samples, report


def note_spans(sample: Sample, report: Report) -> None:
    for start, end in sample.evidence:
        report.notes["spans of zero length"] += start == end
        report.notes["spans that start below 0"] += start < 0
        report.notes["spans that end after the video"] += sample.duration is not None and end > sample.duration


def clipped(spans: tuple[tuple[float, float], ...], duration: float | None) -> tuple[tuple[float, float], ...]:
    """Spans cut to [0, duration]; an unknown duration cuts nothing at the end."""
    limit = math.inf if duration is None else duration
    return tuple((min(max(start, 0.0), limit), min(max(end, 0.0), limit)) for start, end in spans)


def video_path(video: str, root: str | Path | None) -> str:
    """The video's path: under the root if it is relative, with ".mp4" if it has no suffix.

    If that file is not there but the same name with another video suffix is, that one is taken.
    """
    if not video.lower().endswith(VIDEO_SUFFIXES):
        video += ".mp4"
    if root is None:
        return video
    path = Path(root) / video
    if not path.is_file():
        for suffix in VIDEO_SUFFIXES:
            if path.with_suffix(suffix).is_file():
                return str(path.with_suffix(suffix))
    return str(path)


def missing_videos(samples: Iterable[Sample]) -> list[str]:
    """The video files that do not exist, each once, in order."""
    return [video for video in dict.fromkeys(s.video for s in samples) if not Path(video).is_file()]


def check_videos(samples: list[Sample], skip_missing: bool = False) -> list[Sample]:
    """The samples whose video file exists; DataError if one is missing, unless `skip_missing`."""
    missing = missing_videos(samples)
    if missing and not skip_missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{len(missing)} video files are missing: {shown}; check the videos' folder, or --skip_missing")
    gone = set(missing)
    left = [s for s in samples if s.video not in gone]
    if not left:
        raise DataError(f"all {len(missing)} video files are missing, the first is {missing[0]}")
    return left


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSON lines of our record format, which `read_samples` reads back unchanged."""
    lines = []
    for s in samples:
        record = {
            "id": s.id,
            "video": s.video,
            "question": s.question,
            "options": list(s.options),
            "answer": s.meta.get("reference") if s.answer is None else f"({s.answer})",
            "glue": [list(span) for span in s.evidence],
            "duration": s.duration,
            "kind": s.kind,
        }
        meta = {key: value for key, value in s.meta.items() if key != "reference"}
        if meta:
            record["meta"] = meta
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class Entry:
    """A file of a mixture: where it is, how it is read, and how often each of its samples comes per epoch."""

    data: str
    format: str = "records"
    video_root: str = ""
    weight: float = 1.0


def read_mixture(path: str | Path) -> list[Entry]:
    """The files of a mixture, a YAML list of `{data, format, video_root, weight}`; all but `data` may be left out.

    Paths are relative to the current folder. Raises DataError naming file, entry and field.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: a mixture is a list of `- data: FILE` entries, not {type(values).__name__}")
    entries = []
    for number, value in enumerate(values, start=1):
        row = as_row(path, f"entry {number}", value)
        known = [f.name for f in fields(Entry)]
        for name in row.fields:
            if name not in known:
                raise row.error(name, f"is not known; there are {', '.join(known)}")
        given = {name: row.text(name) for name in ("data", "format", "video_root") if name in row.fields}
        if "format" in given and given["format"] not in READERS:
            raise row.error("format", f"{given['format']!r} is none of {', '.join(READERS)}")
        row.text("data")
        weight = row.number("weight") if "weight" in row.fields else 1.0
        entries.append(Entry(**given, weight=weight))
    return entries


@dataclass(frozen=True)
class DataSet:
    """One of the data sets of a mixture: each of its samples comes `weight` times per epoch.

    Of a weight's fraction, so large a share of the samples is drawn, anew in each epoch.
    """

    samples: list[Sample]
    weight: float = 1.0

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return int(self.weight) * len(self.samples) + self.extra

    @property
    def extra(self) -> int:
        """How many of them are drawn."""
        return round((self.weight - int(self.weight)) * len(self.samples))

    def once(self, generator: torch.Generator) -> list[Sample]:
        """The samples of one epoch, not yet shuffled."""
        drawn = torch.randperm(len(self.samples), generator=generator)[: self.extra].tolist()
        return self.samples * int(self.weight) + [self.samples[i] for i in drawn]


# ---------------------------------------------------------------- what a configuration names


def load_samples(name: str, split: str, config: Config) -> list[Sample]:
    """The samples of an annotation file, or of the built-in benchmark's split for `world`. Raises DataError."""
    if name != "world":
        return read_samples(name, config.data_format, video_root=config.video_root or None)
    n_videos = config.world_train_videos if split == "train" else config.world_test_videos
    path = world.build(config.cache, split, n_videos, config.world_seed, config.world_duration, config.world_events)
    return read_samples(path, video_root=path.parent)


def load_training(config: Config) -> list[DataSet]:
    """The training data: one file, or the files of a mixture. Raises DataError."""
    if Path(config.train_data).suffix not in (".yaml", ".yml"):
        entries = [Entry(config.train_data, config.data_format, config.video_root)]
    else:
        entries = read_mixture(config.train_data)
    sets = []
    for entry in entries:
        own = replace(config, data_format=entry.format, video_root=entry.video_root)
        sets.append(DataSet(load_samples(entry.data, "train", own), entry.weight))
        check_training(sets[-1].samples, config, entry.data)
    if not any(map(len, sets)):
        raise DataError(f"{config.train_data}: its weights leave no sample in an epoch; give larger ones")
    return sets


def check_training(samples: Sequence[Sample], config: Config, path: str) -> None:
    """Raise DataError naming the row that lacks what its prompt or every reward needs."""
    if config.multi_turn:
        return check_samples(samples, ("options", "answer"), path)
    if not prompts.TEMPLATES[config.template].event:
        return check_samples(samples, ("options", "answer", "evidence"), path)
    check_samples(samples, (), path)
    for number, row in enumerate(samples, 1):
        if not row.evidence and not (row.options and row.answer):
            raise DataError(f"{path}: row {number} ({row.id}): neither evidence nor an answer to reward")


def check_samples(samples: Sequence[Sample], needed: Sequence[str], path: str) -> None:
    """Raise DataError naming file, row and fields for a sample that lacks one of the `needed` fields."""
    for number, row in enumerate(samples, 1):
        missing = [name for name in needed if not getattr(row, name)]
        if missing:
            raise DataError(f"{path}: row {number} ({row.id}): {', '.join(missing)} needed, but missing or empty")
        if len(row.options) > len(prompts.LETTERS):
            n = len(row.options)
            raise DataError(f"{path}: row {number} ({row.id}): {n} options, but only {len(prompts.LETTERS)} letters")


# ---------------------------------------------------------------- summary


def summary(samples: list[Sample], report: Report) -> str:
    """A few lines on what is in a file: rows, answers, spans, durations, kinds, and the rules that were applied."""
    reasons = Counter(reason for _, reason in report.dropped)
    lengths = [end - start for s in samples for start, end in s.evidence]
    durations = [s.duration for s in samples if s.duration is not None]
    lines = [
        f"{report.format}: {report.path}",
        f"rows kept           {report.kept}",
        f"rows dropped        {len(report.dropped)}",
        *(f"  {count} x {reason}: {first_rows(report, reason)}" for reason, count in reasons.items()),
        f"videos              {len({s.video for s in samples})}",
        f"with an answer      {sum(s.answer is not None for s in samples)}",
        f"options             {counts(len(s.options) for s in samples)}",
        f"spans per question  {counts(len(s.evidence) for s in samples)}",
        f"span lengths, s     {spread(lengths)}",
        f"durations, s        {spread(durations)}, unknown {len(samples) - len(durations)}",
        f"kinds               {counts(s.kind or '-' for s in samples)}",
        *(f"{note}: {count}" for note, count in report.notes.items() if count),
        *report.remarks,
    ]
    return "\n".join(lines)


def first_rows(report: Report, reason: str) -> str:
    rows = [row for row, r in report.dropped if r == reason]
    return ", ".join(rows[:5]) + (", ..." if len(rows) > 5 else "")


def counts(values: Iterable) -> str:
    return ", ".join(f"{value}: {count}" for value, count in sorted(Counter(values).items()))


def spread(numbers: list[float]) -> str:
    if not numbers:
        return "none"
    return f"min {min(numbers):.1f}, median {statistics.median(numbers):.1f}, max {max(numbers):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Summary of an annotation file, and a check of its videos.")
    parser.add_argument("--format", default="records", choices=READERS, help="which reader")
    parser.add_argument("--path", required=True, help="the annotation file (mlvu: also a folder)")
    parser.add_argument("--videos", help="folder of the videos: list those that are missing")
    parser.add_argument("--skip_missing", action="store_true", help="go on without questions whose video is missing")
    parser.add_argument("--out", help="write the samples as JSON lines of our own format")
    args = parser.parse_args()
    try:
        samples, report = read_with_report(args.path, args.format, args.videos)
        print(summary(samples, report))
        if args.videos:
            missing = missing_videos(samples)
            print(f"videos missing      {len(missing)}", *missing, sep="\n  ")
            samples = check_videos(samples, args.skip_missing)
            print(f"questions left      {len(samples)}")
        if args.out:
            write_samples(args.out, samples)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
