"""Questions asked side by side: many looks at videos are one pass, and what is looked at next is decoded meanwhile.

What is done about a question is a generator. It yields the requests whose answers it needs next, is sent these answers,
and returns what it has found:

    def two_passes(agent: Agent, sample: Sample) -> Steps:
        whole = whole_video(agent, sample)
        [coarse] = yield [whole]  # a Group with one greedy response
        spans = visible_spans(coarse.responses[0].spans, whole.view.info.duration)
        [zoom] = yield [zoomed(agent, whole, spans)]  # a Zoom
        return coarse.responses[0].spans, zoom.answer

`side_by_side` runs many of them. A request whose frames cannot be decoded raises its VideoError inside the generator,
which can go on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from annotations.rows import Sample
from config import Config
from episodes import environments
from harness.closer import closer_view, view_alone
from media.file import VideoError
from media.frames import FrameCache
from policy import Vocabulary
from prompts import Spans
from rollout import Group, View, Zoom, answer_clips, roll_out_batch, view_video

FRAME_BYTES = 2**30  # frames and packet tables kept for further looks at a video


@dataclass(frozen=True)
class Agent:
    """A model with its tokenizer, how it is shown videos, and the frames it has been shown."""

    model: torch.nn.Module
    vocabulary: Vocabulary
    config: Config
    frames: FrameCache = field(default_factory=lambda: FrameCache(FRAME_BYTES))

    @cached_property
    def about_events(self) -> Agent:
        """The same, asked for the spans of an event, with LongVTG-R1's prompt."""
        return replace(self, config=replace(self.config, template="longvtg_r1"))


@dataclass
class Request:
    """A look that is asked for: who looks, and in which kind of pass, at what `show` decodes.

    `alone`: as a video that has nothing but these frames. `think`: reasoning that a zoom shows, or None.
    """

    agent: Agent
    sample: Sample
    take: Callable[[Agent, Sequence[Request]], list]
    show: Callable[[], View]
    alone: bool = False
    think: str | None = None

    @cached_property
    def view(self) -> View:
        """What is shown, decoded once. Raises VideoError."""
        return self.show()

    @property
    def kind(self) -> tuple:
        """Requests of one kind can be one pass."""
        return self.take, id(self.agent.model), id(self.agent.config)


Steps = Generator[list[Request], list, Any]


# ---------------------------------------------------------------- passes and their requests


def write(agent: Agent, requests: Sequence[Request]) -> list[Group]:
    """A greedy response to each: reasoning, answer and spans."""
    views = [view_alone(request.view) if request.alone else request.view for request in requests]
    return respond(agent, views)


def play(agent: Agent, requests: Sequence[Request]) -> list[Group]:
    """A greedy episode about each, in which the model asks for clips. VideoZoomer section 3.1."""
    views = [request.view for request in requests]
    return respond(agent, views, environments(views, agent.config, agent.frames))


def respond(agent: Agent, views: Sequence[View], scene: Sequence = ()) -> list[Group]:
    """One greedy response to each view, with what its tokens were chosen from."""
    return roll_out_batch(
        agent.model, views, agent.config, agent.vocabulary, None, environments=scene, keep_hidden=True
    )


def choose(agent: Agent, requests: Sequence[Request]) -> list[Zoom]:
    """The letter of each. Zoom-Zero section 4.1."""
    jobs = [(request.sample, request.view.clip, request.think) for request in requests]
    return answer_clips(agent.model, jobs, agent.config, agent.vocabulary)


def whole_video(agent: Agent, sample: Sample) -> Request:
    """The coarse pass over the whole video or, where the template says so, an episode."""
    take = play if agent.config.multi_turn else write
    return Request(agent, sample, take, partial(view_video, sample, agent.config, agent.frames))


def zoomed(agent: Agent, whole: Request, spans: Spans, think: str | None = None) -> Request:
    """The letter again, from these spans alone (none: the whole video), closer and at a higher frame rate."""

    def show() -> View:
        return closer_view(whole.view, spans, agent.config, agent.frames)

    return Request(agent, whole.sample, choose, show, think=think)


# ---------------------------------------------------------------- side by side


class Finished(NamedTuple):
    """What became of a question: what its steps returned, or the VideoError that ended them.

    `seconds`: decoding its frames, and its share of the passes.
    """

    name: Any
    result: Any
    seconds: float


@dataclass(eq=False)
class Running:
    """A question that waits for the answers to its requests, which are being decoded."""

    name: Any
    steps: Steps
    seconds: float = 0.0
    requests: list[Request] = field(default_factory=list)
    decoded: Future | None = None


def side_by_side(
    questions: Iterable[tuple[Any, Steps]],
    batch: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Finished]:
    """Go through the steps of all questions, each with its name; yields them as they end.

    A pass answers up to `batch` requests: those of the question that has waited longest, and others of the same kind.
    About as many more are decoded meanwhile, and no further ones are begun. What is computed together depends on the
    questions alone, not on time. A pass runs without gradients, under `autocast`.
    """
    waiting = iter(questions)
    line: list[Running] = []
    decoder = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def go_on(one: Running, next_step: Callable[[], list[Request]]) -> Iterator[Finished]:
        try:
            one.requests = next_step()
        except StopIteration as end:
            yield Finished(one.name, end.value, one.seconds)
        except VideoError as error:
            yield Finished(one.name, error, one.seconds)
        else:
            one.decoded = decoder.submit(decode, one.requests)
            line.append(one)

    try:
        while True:
            while sum(len(one.requests) for one in line) < 2 * batch:
                begun = next(waiting, None)
                if begun is None:
                    break
                yield from go_on(Running(*begun), partial(next, begun[1]))
            if not line:
                return
            together = next_pass(line, batch)
            line[:] = [one for one in line if one not in together]
            ready = []
            for one in together:
                try:
                    one.seconds += one.decoded.result()
                    ready.append(one)
                except VideoError as error:
                    yield from go_on(one, partial(one.steps.throw, error))
            answers = iter(run_pass([request for one in ready for request in one.requests], batch, autocast))
            for one in ready:
                replies, seconds = zip(*(next(answers) for _ in one.requests), strict=True)
                one.seconds += sum(seconds)
                yield from go_on(one, partial(one.steps.send, list(replies)))
    finally:
        decoder.shutdown(wait=True, cancel_futures=True)


def next_pass(line: Sequence[Running], batch: int) -> list[Running]:
    """The first in line, and behind it those of the same kind, as long as they have at most `batch` requests."""
    kind, together, size = line[0].requests[0].kind, [], 0
    for one in line:
        if one.requests[0].kind == kind and (not together or size + len(one.requests) <= batch):
            together.append(one)
            size += len(one.requests)
    return together


def decode(requests: Sequence[Request]) -> float:
    """Decode what is shown; returns the seconds that it took. Raises VideoError."""
    start = time.perf_counter()
    for request in requests:
        _ = request.view
    return time.perf_counter() - start


def run_pass(
    requests: Sequence[Request], batch: int, autocast: Callable[[], AbstractContextManager]
) -> Iterator[tuple[Any, float]]:
    """The answer to each request, and its share of the seconds, `batch` at a time."""
    for start in range(0, len(requests), batch):
        part, began = requests[start : start + batch], time.perf_counter()
        agent = part[0].agent
        with torch.no_grad(), autocast():
            answers = part[0].take(agent, part)
        if agent.model.device.type == "cuda":
            torch.cuda.synchronize()
        share = (time.perf_counter() - began) / len(part)
        yield from ((answer, share) for answer in answers)
