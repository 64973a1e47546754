"""The steps of a training run, in order: what resumes, decodes ahead, stops at a signal, saves and logs around them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.batches import Reading
from harness.checkpoints import resume, save_checkpoint
from harness.log import keep_metrics, log_step
from harness.run import Stopped, StopSignal, finish


class Session:
    """Within it, `steps` yields the numbers of the steps that are left.

    Signals are noted, and end the run with a checkpoint at the next border between phases: a step that was begun is
    repeated by --resume, which leaves the same metrics and weights.

    run: `setup.Run`. batches: from the first step, an iterator of what each step gets. headline: which metrics the
    progress bar shows, {its name there: the metric's}. draw: called before each checkpoint and however the run ends, to
    show how it stands. evaluate: called with the number of steps done, every `eval_every` of them; returns the score by
    which the best checkpoint is kept, or None.
    """

    def __init__(
        self,
        run: Any,
        batches: Callable[[Reading, int], Iterator[list]],
        headline: Mapping[str, str],
        *,
        draw: Callable[[], None] = lambda: None,
        evaluate: Callable[[int], float | None] = lambda step: None,
    ):
        self.run, self.make_batches, self.headline = run, batches, headline
        self.draw, self.evaluate = draw, evaluate
        self.reading = Reading()
        self.seconds: dict[str, float] = {}  # of the step, by phase
        self.done = 0  # steps
        self.saved: int | None = None  # steps that the checkpoint has
        self.counted = (0, 0)  # samples drawn and failed up to the steps done

    def __enter__(self) -> Session:
        config, accelerator = self.run.config, self.run.accelerator
        if config.resume:
            progress = resume(self.run)
            self.done = self.saved = progress["step"]
            self.counted = self.reading.drawn, self.reading.failures = progress["drawn"], progress["failures"]
        keep_metrics(Path(config.out) / "metrics.jsonl", self.done, accelerator)
        self.open = contextlib.ExitStack()
        self.stop = self.open.enter_context(StopSignal(accelerator))
        self.batches = self.open.enter_context(contextlib.closing(self.make_batches(self.reading, self.done)))
        off = None if accelerator.is_main_process else True  # None: off without a terminal
        self.bar = self.open.enter_context(tqdm(total=config.steps, initial=self.done, unit="step", disable=off))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        with self.open:
            if error is not None:
                self.draw()
            if isinstance(error, Stopped):
                self.reading.drawn, self.reading.failures = self.counted
                if self.done != self.saved:
                    self.save()
                finish(self.run.accelerator, self.run.policy)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left. Raises Stopped after a signal."""
        config = self.run.config
        if self.done >= config.steps:
            self.draw()  # of a finished run, whose curves may be gone
        while self.done < config.steps:
            self.seconds = {}
            yield self.done
            self.done += 1
            self.counted = self.reading.drawn, self.reading.failures
            last = self.done == config.steps
            evaluated = config.eval_every and self.done % config.eval_every == 0 and not last
            score = self.evaluate(self.done) if evaluated else None
            if last or self.done % config.save_every == 0 or score is not None:
                self.draw()
                self.save(score)
            self.stop.check()

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of the steps done. score: of `evaluate`."""
        drawn, failures = self.counted
        save_checkpoint(self.run, {"step": self.done, "drawn": drawn, "failures": failures}, score)
        self.saved = self.done

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step, whose seconds are logged."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def next_batch(self) -> list:
        """What the step gets, decoded in the background."""
        with self.phase("decode"):
            return next(self.batches)

    def log(self, metrics: Mapping[str, float]) -> None:
        """The step's line in metrics.jsonl, for the tracker, and on the progress bar."""
        total = sum(self.seconds.values())
        times = {f"seconds/{name}": value for name, value in self.seconds.items()} | {"seconds/step": total}
        log_step(self.run, self.done, {**metrics, **times})
        known = {name: metrics[metric] for name, metric in self.headline.items() if metric in metrics}
        shown = {name: f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}" for name, value in known.items()}
        shown["s/step"] = f"{total:.1f}"
        self.bar.set_postfix(shown)
        self.bar.update()
        number, config = self.done + 1, self.run.config
        if self.bar.disable and (number % config.log_every == 0 or number == config.steps):
            figures = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.run.accelerator.print(f"step {number}/{config.steps}  {figures}", flush=True)
