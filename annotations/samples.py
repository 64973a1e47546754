"""Samples: loading them from annotation files or the built-in benchmark, mixtures of files, and what is needed of them.

`read_samples` turns an annotation file into a list of `Sample`, in any format of formats.py. `write_samples` writes our
own. `load_samples` and `load_training` read what a configuration names.

`python -m annotations.samples --format nextgqa --path test.csv --videos DIR` prints what is in a file and which videos
are missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import statistics
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import yaml

import prompts
from annotations.formats import FORMATS, looks_like
from annotations.packed import Packed
from annotations.parts import Values, read_in_parts
from annotations.records import Usual, read_records, usual_sample
from annotations.rows import (
    MISSING_NAMED,
    DataError,
    Dropped,
    Report,
    Row,
    Sample,
    as_row,
    by_reason,
    read_text,
    short,
)
from config import Config, ConfigError
from media.decode import probe
from media.file import VideoError
from world import benchmark

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")
VIDEO_SUFFIXES += (".m2ts", ".mts", ".vob", ".ogv", ".gif")
MAX_DROPPED = 0.05  # the share of rows that may be unusable
MAX_DIFFERENCE = 1.0  # seconds between the duration of a row and its file that pass without a word
MAX_WEIGHT = 1000  # of a file in a mixture: so often its samples come per epoch
PROBED = 8  # videos of a training file that are looked at before a model is loaded
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- loading


def read_samples(path: str | Path, format: str = "records", video_root: str | Path | None = None) -> list[Sample]:
    """The samples of an annotation file; what was dropped of it is logged as a warning.

    `format` is a key of FORMATS. `video_root` is put before relative video paths. Raises DataError, naming file, row
    and field, for a file that cannot be used, also if more than MAX_DROPPED of its rows cannot.
    """
    samples, report = read_with_report(path, format, video_root)
    review(report)
    return samples


def read_with_report(
    path: str | Path, format: str = "records", video_root: str | Path | None = None
) -> tuple[list[Sample], Report]:
    """Like `read_samples`, but returns the Report too, and any share of the rows may be dropped."""
    report = Report(Path(path), format)
    return list(stream(report, video_root)), report


def stream(
    report: Report, video_root: str | Path | None, as_read: bool = False, values: Values | None = None
) -> Iterator[Sample | Usual]:
    """The samples of a report's file, one after another; the report is complete when they are through.

    `as_read`: a usual record with evidence, of which there is nothing to report, comes as it is, with its video's path.
    `values`: those of a part of a file of our records.
    """
    path, format = report.path, report.format
    if format not in FORMATS:
        raise DataError(f"unknown format '{format}'; known: {', '.join(FORMATS)}")
    read = FORMATS[format].read if values is None else functools.partial(read_records, values=values)
    names = functools.lru_cache(1 << 8)(names_in)
    find = functools.lru_cache(1 << 16)(functools.partial(find_video, root=video_root, names=names))
    seen: set[int] = set()  # hashes of the ids
    try:
        for sample in read(path, report):
            if isinstance(sample, tuple):
                id, video, question, options, answer, glue, duration, kind = sample
                file, there = find(video)
                key = hash(id)
                if as_read and there and key not in seen and question.strip() and unremarkable(glue, duration):
                    seen.add(key)
                    report.kept += 1
                    report.with_evidence += 1
                    yield id, file, question, options, answer, glue, duration, kind
                    continue
                sample = usual_sample(sample)
            if not sample.question.strip():
                report.drop(sample.id, "empty question")
                continue
            if (key := hash(sample.id)) in seen:
                raise DataError(f"{path}: two rows have the id '{sample.id}'")
            seen.add(key)
            if found := flaw(sample):
                raise Row(path, f"question '{sample.id}'", {}).error(*found)
            if sample.evidence:
                note_evidence(sample, report)
            sample.video, there = find(sample.video)  # nobody has seen the sample yet
            if not there:
                report.missing += 1
                if len(report.missing_videos) < MISSING_NAMED and sample.video not in report.missing_videos:
                    report.missing_videos.append(sample.video)
            report.kept += 1
            yield sample
    except DataError as error:
        guess = looks_like(path)
        if report.kept or guess in (None, format) or str(error).startswith(f"{path}: two rows"):
            raise
        hint = "dialogues, for sft.py" if guess == "dialogues" else f"{guess}: choose --data_format {guess}"
        raise DataError(f"{error}; it looks like {hint}") from error
    if not report.kept:
        raise DataError(
            f"{path}: none of the {len(report.dropped)} rows can be used: {'; '.join(dropped_reasons(report))}"
        )


def flaw(sample: Sample) -> tuple[str, str] | None:
    """The field of a sample that no program could use, whatever was read from the file, and what is wrong with it."""
    if not sample.id.isascii() and (found := prompts.half_character(sample.id)):
        return "id", f"{found}; remove it"
    if not sample.video.strip():
        return "video", "is empty"
    if sample.duration is not None and not 0 < sample.duration < math.inf:
        return "duration", f"expected a positive number, got {sample.duration}"
    return None


def dropped_reasons(report: Report) -> list[str]:
    left = [f"{count} x {reason}" for reason, count in report.left_out.items()]
    return [*by_reason(report.dropped), *left]


def review(report: Report) -> None:
    """Log what is wrong with some rows of a file. Raises DataError if more than MAX_DROPPED were dropped."""
    dropped, total = len(report.dropped), len(report.dropped) + report.kept
    if dropped > MAX_DROPPED * total:
        raise DataError(
            f"{report.path}: {dropped} of {total} rows cannot be used, more than {MAX_DROPPED:.0%}: "
            f"{'; '.join(by_reason(report.dropped))}; mend these rows or remove them"
        )
    if dropped_reasons(report):
        log.warning("%s: %d rows dropped: %s", report.path, dropped, "; ".join(dropped_reasons(report)))
    if report.out_of_reach:
        counts = f"{len(report.out_of_reach)} of {report.with_evidence}"
        log.warning("%s: no span can hit the evidence of %s questions: %s", report.path, counts, unreached(report))


def unreached(report: Report) -> str:
    return "; ".join(by_reason(report.out_of_reach))


# ---------------------------------------------------------------- evidence


def note_evidence(sample: Sample, report: Report) -> None:
    """Count what is unusual about a sample's evidence, of which there is some. Raises DataError if it is not finite."""
    report.with_evidence += 1
    limit = math.inf if sample.duration is None else sample.duration
    reachable = False
    for start, end in sample.evidence:
        if not -math.inf < start <= end < math.inf:
            place = Row(report.path, f"question '{sample.id}'", {})
            raise place.error("evidence", f"expected finite [start, end], got {[start, end]}")
        reachable |= start < end and end > 0 and start < limit
        if start == end:
            report.notes["spans of zero length"] += 1
        if start < 0:
            report.notes["spans that start below 0"] += 1
        if end > limit:
            report.notes["spans that end after the video"] += 1
    if not reachable:
        reason = out_of_reach(sample.evidence, sample.duration)
        report.out_of_reach.append(Dropped(sample.id, reason, short(list(sample.evidence))))


def unremarkable(evidence: Sequence[Sequence[float]], duration: float | None) -> bool:
    """Whether there is evidence, and nothing of it that `note_evidence` notes."""
    for start, end in evidence:
        if not 0 <= start < end <= (end if duration is None else duration):
            return False
    return bool(evidence)


def out_of_reach(evidence: Sequence[tuple[float, float]], duration: float | None) -> str | None:
    """Why no span in a video of so many seconds (None: unknown) can hit any of the evidence; None if one can."""
    for start, end in evidence:
        if start < end and end > 0 and (duration is None or start < duration):
            return None
    if all(start == end for start, end in evidence):
        return "evidence of zero length"
    if duration is None or any(end <= 0 for _, end in evidence):
        return "evidence before the video"
    late = all(end <= 1000 * duration for _, end in evidence)
    return "evidence beyond the video" + (", in milliseconds?" if late else "")


def misfit(sample: Sample, duration: float) -> str | None:
    """What does not fit between a sample and its file's seconds; None if all does."""
    if sample.evidence and (reason := out_of_reach(sample.evidence, duration)):
        return f"{reason}: {short(list(sample.evidence))} in {duration:.1f} s"
    if sample.duration is not None and abs(sample.duration - duration) > MAX_DIFFERENCE:
        return f"the file has {duration:.1f} s, not the {sample.duration:.1f} s of its row"
    return None


def warn_of_misfit(sample: Sample, duration: float) -> None:
    """Log what does not fit between a sample and its file's seconds, once per sample."""
    if problem := misfit(sample, duration):
        warn_once(f"sample {sample.id} ({sample.video}): {problem}")


@functools.lru_cache(1 << 16)
def warn_once(message: str) -> None:
    log.warning("%s", message)


# ---------------------------------------------------------------- videos


def video_path(video: str, root: str | Path | None) -> str:
    """The video's path: under the root if it is relative, with ".mp4" if it has no suffix.

    If that file is not there, but another spelling of the name is, that one is taken: with another video suffix or one
    in capitals, with "/" for "\\", with accents as letters of their own or not.
    """
    return find_video(video, root)[0]


def names_in(folder: str) -> frozenset[str]:
    """The names in a folder; none if there is no such folder."""
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()


def find_video(
    video: str, root: str | Path | None, names: Callable[[str], frozenset[str]] = names_in
) -> tuple[str, bool]:
    """`video_path`, and whether the file is there. A folder is listed by `names`, which may remember it."""

    def under_root(name: str) -> str:
        return name if root is None else os.path.join(root, name)

    usual = under_root(video)
    if os.path.isfile(usual):
        return usual, True
    for path in map(under_root, spellings(video)):
        folder, name = os.path.split(path)
        if name in names(folder) and os.path.isfile(path):
            return path, True
    return (usual if video.lower().endswith(VIDEO_SUFFIXES) else under_root(video + ".mp4")), False


def spellings(video: str) -> Iterator[str]:
    """The names under which a video may be found, the likeliest first."""
    for name in dict.fromkeys([video, video.replace("\\", "/")]):
        for text in dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]):
            yield text
            stem, dot, suffix = text.rpartition(".")
            stem = stem if f"{dot}{suffix}".lower() in VIDEO_SUFFIXES else text
            yield from (stem + suffix for suffix in VIDEO_SUFFIXES if stem + suffix != text)
            yield from (stem + suffix.upper() for suffix in VIDEO_SUFFIXES if stem + suffix.upper() != text)


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

    Zoom-Zero's own files are read too: `datasets:`, a list of `{json_path, data_folder}`. Paths are relative to the
    current folder. Raises DataError naming file, entry and field.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    names = {f.name: f.name for f in fields(Entry)}
    if isinstance(values, dict) and list(values) == ["datasets"]:
        values, names = values["datasets"], {"json_path": "data", "data_folder": "video_root"}
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: a mixture is a list of `- data: FILE` entries, not {type(values).__name__}")
    return [read_entry(as_row(path, f"entry {n}", value), names) for n, value in enumerate(values, start=1)]


def read_entry(row: Row, names: dict[str, str]) -> Entry:
    """A file of a mixture; `names`: the fields of an Entry by the names that they have in the row."""
    for name in row.fields:
        if name not in names:
            raise row.error(str(name), f"is not known; there are {', '.join(names)}")
    values: dict = {names[name]: row.text(name) for name in row.fields if name != "weight"}
    if "format" in values and values["format"] not in FORMATS:
        raise row.error("format", f"{short(values['format'])} is none of {', '.join(FORMATS)}")
    row.text(next(name for name in names if names[name] == "data"))
    if "weight" in row.fields:
        values["weight"] = row.number("weight")
        if values["weight"] > MAX_WEIGHT:
            raise row.error("weight", f"expected at most {MAX_WEIGHT}, got {values['weight']:g}")
    return Entry(**values)


@dataclass(frozen=True)
class DataSet:
    """One of the data sets of a mixture: each of its samples comes `weight` times per epoch.

    Of a weight's fraction, so large a share of the samples is drawn, anew in each epoch.
    """

    samples: Sequence[Sample]
    weight: float = 1.0

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return int(self.weight) * len(self.samples) + self.extra

    @property
    def extra(self) -> int:
        """How many of them are drawn."""
        return round((self.weight - int(self.weight)) * len(self.samples))

    def once(self, generator: torch.Generator) -> torch.Tensor:
        """The places of the samples of one epoch, int64, not yet shuffled."""
        drawn = torch.randperm(len(self.samples), generator=generator)[: self.extra]
        return torch.cat([torch.arange(len(self.samples)).repeat(int(self.weight)), drawn])


class Epochs:
    """The order in which the samples of a mixture come: in each epoch a permutation, which depends on the seed alone.

    `random` makes a generator of the names of what is drawn.
    """

    def __init__(self, sets: Sequence[DataSet], random: Callable[..., torch.Generator]):
        self.sets, self.random = sets, random
        self.order = functools.lru_cache(2)(self._order)

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return sum(map(len, self.sets))

    def sample(self, epoch: int, index: int) -> Sample:
        """The sample at a place of an epoch."""
        return self._at(self.order(("part", epoch), ("epoch", epoch))[index])

    def redrawn(self, step: int, attempt: int) -> Iterator[Sample]:
        """The samples to try in a step in place of others, an epoch of its own for each attempt."""
        return map(self._at, self._order(("redraw part", step), ("redraw", step, attempt)))

    def _order(self, part: tuple, whole: tuple) -> torch.Tensor:
        """The set and the place in it of each sample of an epoch, int64 [length, 2]; what is drawn for it has names."""
        places = [sample_set.once(self.random(part[0], k, *part[1:])) for k, sample_set in enumerate(self.sets)]
        once = torch.cat([torch.stack([torch.full_like(place, k), place], 1) for k, place in enumerate(places)])
        return once[torch.randperm(len(self), generator=self.random(*whole))]

    def _at(self, place: torch.Tensor) -> Sample:
        number, index = place.tolist()
        return self.sets[number].samples[index]


# ---------------------------------------------------------------- what a configuration names


def locate(name: str, split: str, config: Config) -> tuple[str | Path, str, str | Path | None]:
    """The annotation file, its format and its videos' folder; `world` is the built-in benchmark, written if needed.
    Raises ConfigError for a world that cannot be.
    """
    if name != "world":
        return name, config.data_format, config.video_root or None
    n_videos = config.world_train_videos if split == "train" else config.world_test_videos
    world = {
        "duration": config.world_duration,
        "min_duration": config.world_min_duration,
        "n_events": config.world_events,
    }
    try:
        path = benchmark.build(config.cache, split, n_videos, config.world_seed, **world)
    except ValueError as error:
        raise ConfigError(f"world_events = {config.world_events}: {error}") from None
    return path, "records", path.parent


def load_samples(name: str, split: str, config: Config) -> list[Sample]:
    """The samples of an annotation file, or of the built-in benchmark's split for `world`. Raises DataError."""
    return read_samples(*locate(name, split, config))


def load_test(config: Config) -> list[Sample]:
    """The samples to evaluate in a training run, none without `test_data`. Raises DataError."""
    if not config.test_data:
        return []
    path, format, root = locate(config.test_data, "test", config)
    report = Report(Path(path), format)
    samples = list(stream(report, root))
    review(report)
    check_present(report, config.max_failed_videos)
    return samples


def load_training(config: Config) -> list[DataSet]:
    """The training data: one file, or the files of a mixture. Raises DataError.

    Also for a file of which too many videos are missing, or most evidence cannot be hit.
    """
    if Path(config.train_data).suffix not in (".yaml", ".yml"):
        entries = [Entry(config.train_data, config.data_format, config.video_root)]
    else:
        entries = read_mixture(config.train_data)
    sets = []
    for entry in entries:
        path, format, root = locate(
            entry.data, "train", replace(config, data_format=entry.format, video_root=entry.video_root)
        )
        report = Report(Path(path), format)
        noise = config.world_label_noise if entry.data == "world" else 0
        if noise:
            rows = trainable(stream(report, root), config, entry.data)
            samples = Packed(mislabelled(rows, noise, config.world_seed))
        else:
            samples = read_packed(report, root, config, entry.data)
        review(report)
        check_training_files(samples, report, config.max_failed_videos)
        sets.append(DataSet(samples, entry.weight))
    if not any(map(len, sets)):
        raise DataError(f"{config.train_data}: its weights leave no sample in an epoch; give larger ones")
    return sets


def read_packed(report: Report, root: str | Path | None, config: Config, name: str) -> Packed:
    """The samples of a report's file for training, packed; our own format's large files are read in parts."""

    def rows(report: Report, values: Values | None = None) -> Iterator[Sample | Usual]:
        return trainable(stream(report, root, True, values), config, name)

    samples = read_in_parts(report, rows) if report.format == "records" else None
    return Packed(rows(report)) if samples is None else samples


def mislabelled(samples: Iterable[Sample], most: float, seed: int) -> Iterator[Sample]:
    """The samples with every end of their evidence moved by at most `most` seconds, evenly, within the video.

    A sample's labels are always the same for a seed: they are wrong, they do not flicker.
    """
    for sample in samples:
        random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {sample.id}".encode()))
        off = most * (2 * torch.rand(len(sample.evidence), 2, generator=random, dtype=torch.float64) - 1)
        moved = (torch.tensor(sample.evidence, dtype=torch.float64) + off).clamp(0.0, sample.duration)
        yield replace(sample, evidence=tuple(map(tuple, moved.sort(dim=1).values.tolist())))


def check_training_files(samples: Sequence[Sample], report: Report, max_missing: float) -> None:
    """Raise DataError if more than a share of the videos is missing, or most evidence cannot be hit.

    The durations of a few files are looked at, since rows may state none, or wrong ones.
    """
    check_present(report, max_missing)
    if 2 * len(report.out_of_reach) > report.with_evidence:
        count = f"{len(report.out_of_reach)} of {report.with_evidence}"
        raise DataError(f"{report.path}: no span can hit the evidence of {count} samples: {unreached(report)}")
    problems, seen = [], 0
    for index in sorted({k * len(samples) // PROBED for k in range(PROBED)}):
        sample = samples[index]
        if not sample.evidence:
            continue
        try:
            duration = probe(sample.video).duration
        except VideoError:
            continue
        seen += 1
        if out_of_reach(sample.evidence, duration):
            problems.append(f"{sample.id}: {misfit(sample, duration)}")
    if 2 * len(problems) > seen:
        raise DataError(
            f"{report.path}: no span can hit the evidence of {len(problems)} of {seen} samples: {problems[0]}"
        )


def check_present(report: Report, max_missing: float) -> None:
    """Log that videos are missing. Raises DataError if they are those of more than a share of the samples."""
    if not report.missing:
        return
    first = ", ".join(report.missing_videos)
    problem = f"{report.path}: the videos of {report.missing} of {report.kept} samples are missing: {first}"
    if report.missing > max_missing * report.kept:
        raise DataError(f"{problem}; check video_root (max_failed_videos = {max_missing:g})")
    log.warning("%s", problem)


def trainable(samples: Iterable[Sample | Usual], config: Config, path: str) -> Iterator[Sample | Usual]:
    """The samples; DataError naming the row that lacks what its prompt or every reward needs."""
    if config.multi_turn:
        yield from complete(samples, ("options", "answer"), path)
    elif not prompts.TEMPLATES[config.template].event:
        spans = () if config.grounding == "none" else ("evidence",)
        yield from complete(samples, ("options", "answer", *spans), path)
    else:
        for number, sample in enumerate(complete(samples, (), path), start=1):
            spans_count = isinstance(sample, tuple) or (sample.evidence and config.grounding != "none")
            if not spans_count and not (sample.options and sample.answer):
                raise DataError(f"{path}: row {number} ({sample.id}): neither evidence nor an answer to reward")
            yield sample


def complete(samples: Iterable[Sample | Usual], needed: Sequence[str], path: str) -> Iterator[Sample | Usual]:
    """The samples; DataError naming file, row and fields for one that lacks a `needed` field."""
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, tuple):  # a usual record with evidence lacks nothing
            yield sample
            continue
        for name in needed:
            if not getattr(sample, name):
                missing = ", ".join(name for name in needed if not getattr(sample, name))
                raise DataError(f"{path}: row {number} ({sample.id}): {missing} needed, but missing or empty")
        if len(sample.options) > len(prompts.LETTERS):
            n = len(sample.options)
            raise DataError(f"{path}: row {number} ({sample.id}): {n} options, but only {len(prompts.LETTERS)} letters")
        yield sample


def check_samples(samples: Sequence[Sample], needed: Sequence[str], path: str) -> None:
    """Raise DataError naming file, row and fields for a sample that lacks one of the `needed` fields."""
    for _ in complete(samples, needed, path):
        pass


# ---------------------------------------------------------------- summary


def samples_summary(samples: list[Sample], report: Report) -> str:
    """A few lines on what is in a file: rows, answers, spans, durations, kinds, and the rules that were applied."""
    lengths = [end - start for s in samples for start, end in s.evidence]
    durations = [s.duration for s in samples if s.duration is not None]
    lines = [
        f"{report.format}: {report.path}",
        f"rows kept           {report.kept}",
        f"rows dropped        {len(report.dropped)}",
        *(f"  {line}" for line in dropped_reasons(report)),
        f"videos              {len({s.video for s in samples})}",
        f"with an answer      {sum(s.answer is not None for s in samples)}",
        f"options             {counts(len(s.options) for s in samples)}",
        f"spans per question  {counts(len(s.evidence) for s in samples)}",
        f"span lengths, s     {spread(lengths)}",
        f"durations, s        {spread(durations)}, unknown {len(samples) - len(durations)}",
        f"kinds               {counts(s.kind or '-' for s in samples)}",
        *(f"{note}: {count}" for note, count in report.notes.items() if count),
        *(f"no span can hit the evidence of {line}" for line in by_reason(report.out_of_reach)),
        *report.remarks,
    ]
    return "\n".join(lines)


def counts(values: Iterable) -> str:
    return ", ".join(f"{value}: {count}" for value, count in sorted(Counter(values).items()))


def spread(numbers: list[float]) -> str:
    if not numbers:
        return "none"
    return f"min {min(numbers):.1f}, median {statistics.median(numbers):.1f}, max {max(numbers):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Summary of an annotation file, and a check of its videos.")
    parser.add_argument("--format", default="records", choices=FORMATS, help="which reader")
    parser.add_argument("--path", required=True, help="the annotation file (mlvu: also a folder)")
    parser.add_argument("--videos", help="folder of the videos: list those that are missing")
    parser.add_argument("--skip_missing", action="store_true", help="go on without questions whose video is missing")
    parser.add_argument("--out", help="write the samples as JSON lines of our own format")
    args = parser.parse_args()
    try:
        samples, report = read_with_report(args.path, args.format, args.videos)
        print(samples_summary(samples, report))
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
