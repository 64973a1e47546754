"""Which samples a step gets, and their views, decoded while the model computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator

from annotations.rows import Sample
from annotations.samples import Epochs
from config import Config
from harness.run import TrainingError
from media.file import VideoError
from media.prefetch import prefetch
from rollout import View, response_seed, view_video

log = logging.getLogger("zoomgrpo")
SPARE = 64  # samples to try in place of one whose video cannot be read


def generator(*parts: object) -> torch.Generator:
    """Random numbers that depend on what they are for alone."""
    return torch.Generator().manual_seed(response_seed(*parts))


@dataclass
class Drawn:
    """A view, and the samples before it whose videos could not be read: (sample, error)."""

    view: View
    failed: list[tuple[Sample, VideoError]]


@dataclass
class Reading:
    """What became of the videos of a run's samples so far."""

    drawn: int = 0  # samples taken, on all processes
    failures: int = 0  # of those, with an unreadable video
    unreadable: dict[str, VideoError] = field(default_factory=dict)  # by video
    named: set[str] = field(default_factory=set)  # unreadable videos that the log has named

    def view(self, candidates: list[Sample], draw: tuple[int, int], config: Config) -> Drawn:
        """The first candidate whose video can be read; `draw` is its view's. Raises TrainingError if there is none."""
        failed: list[tuple[Sample, VideoError]] = []
        for sample in candidates:
            if sample.video not in self.unreadable:
                try:
                    return Drawn(replace(view_video(sample, glance_config(config, draw)), draw=draw), failed)
                except VideoError as error:
                    self.unreadable[sample.video] = error
            failed.append((sample, self.unreadable[sample.video]))
        raise TrainingError(f"none of {len(candidates)} videos drawn in a row could be read; the last: {failed[-1][1]}")

    def note(
        self, drawn: int, failed: list[tuple[Sample, VideoError]], config: Config, accelerator: Accelerator
    ) -> None:
        """Count unreadable videos over all processes, name each once. Raises TrainingError when they are too many."""
        for sample, error in failed:
            if sample.video not in self.named:
                self.named.add(sample.video)
                log.warning("skipping sample %s: %s", sample.id, error)
        counts = torch.tensor([float(drawn), float(len(failed))], device=accelerator.device)
        total, failures = accelerator.reduce(counts, "sum").tolist()
        self.drawn += int(total)
        self.failures += int(failures)
        if self.failures > config.max_failed_videos * max(self.drawn, 100):
            last = f"; the last: {failed[-1][1]}" if failed else ""
            raise TrainingError(
                f"{self.failures} of {self.drawn} samples had an unreadable video, more than max_failed_videos = "
                f"{config.max_failed_videos} allows{last}"
            )


def glance_config(config: Config, place: tuple[int, int]) -> Config:
    """The configuration of the coarse pass of a draw: with `least_frames`, its most frames are drawn evenly (ParaVT,
    arXiv 2605.20342), so that a call pays only where the overview does not show enough.
    """
    if not config.least_frames:
        return config
    random = generator(config.seed, "frames", *place)
    return replace(
        config, max_frames=int(torch.randint(config.least_frames, config.max_frames + 1, (), generator=random))
    )


def draw(config: Config, accelerator: Accelerator, epochs: Epochs, step: int) -> Iterator[tuple[int, list[Sample]]]:
    """For each of this process' prompts of a step: its place among all prompts of the run, the sample, and others to
    take if its video cannot be read.

    The order is a permutation per epoch that depends on the seed alone. Each of the step's updates gets a consecutive
    part, and of that each process, so that an update sees the same prompts however many processes there are.
    """
    per_update = config.prompts_per_step // config.updates_per_rollout
    count = per_update // accelerator.num_processes
    for number in range(config.updates_per_rollout):
        first = step * config.prompts_per_step + number * per_update + accelerator.process_index * count
        for position in range(first, first + count):
            epoch, index = divmod(position, len(epochs))
            spare = torch.randint(len(epochs), (SPARE,), generator=generator(config.seed, "spare", position))
            yield position, [epochs.sample(epoch, i) for i in [index, *spare.tolist()]]


def view_batches(
    config: Config, accelerator: Accelerator, epochs: Epochs, reading: Reading, first_step: int
) -> Iterator[list[Drawn]]:
    """This process' views of each step, decoded in the background while the model computes."""
    share = config.prompts_per_step // accelerator.num_processes
    jobs = (
        partial(reading.view, candidates, (place, 0), config)
        for step in range(first_step, config.steps)
        for place, candidates in draw(config, accelerator, epochs, step)
    )
    with prefetch(jobs, ahead=2 * share) as views:
        for _ in range(first_step, config.steps):
            yield [next(views) for _ in range(share)]


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
