"""Questions side by side: what shares a pass, what is decoded meanwhile, and what a video that cannot be read ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from harness import asking
from harness.asking import Agent, Request, side_by_side
from media.file import VideoError

MODEL = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def agent():
    return Agent(MODEL, None, SimpleNamespace())


class Passes:
    """Two kinds of passes that answer with what they are shown, and note what shared a pass and in which thread it was
    decoded.
    """

    def __init__(self):
        self.passes: list[list] = []
        self.decoded: list = []
        self.threads: set[str] = set()

    def write(self, agent, requests):
        assert not torch.is_grad_enabled()
        self.passes.append([request.view for request in requests])
        return [request.view for request in requests]

    def choose(self, agent, requests):
        return self.write(agent, requests)

    def request(self, agent, what, take="write") -> Request:
        def show():
            self.threads.add(threading.current_thread().name)
            self.decoded.append(what)
            if "broken" in str(what):
                raise VideoError(str(what), "it is broken", "mend it")
            return what

        return Request(agent, None, getattr(self, take), show)


@pytest.fixture
def noted():
    return Passes()


def two_looks(agent, noted, name):
    """A look and, for even numbers, a closer one."""
    [first] = yield [noted.request(agent, (name, "coarse"))]
    if name % 2:
        return [first]
    [second] = yield [noted.request(agent, (name, "close"), "choose")]
    return [first, second]


def test_every_question_gets_its_answers_and_passes_are_full(agent, noted):
    questions = [(k, two_looks(agent, noted, k)) for k in range(20)]
    found = {name: result for name, result, _ in side_by_side(questions, 4)}
    assert found == {k: [(k, "coarse")] + [(k, "close")] * (k % 2 == 0) for k in range(20)}
    assert {len({kind for _, kind in one}) for one in noted.passes} == {1}
    assert sum(map(len, noted.passes)) == 30 and [len(one) for one in noted.passes] == [4] * 7 + [2]


def test_what_shares_a_pass_does_not_depend_on_time(agent):
    runs = []
    for _ in range(2):
        noted = Passes()
        list(side_by_side([(k, two_looks(agent, noted, k)) for k in range(9)], 2))
        runs.append(noted.passes)
    assert runs[0] == runs[1]


def test_the_next_ones_are_decoded_in_another_thread_and_no_further_ones(agent, noted):
    """When a pass begins, at most as many again are begun."""
    begun = []
    write = noted.write

    def counted(agent, requests):
        begun.append(started)
        return write(agent, requests)

    noted.write = counted
    started = 0

    def questions():
        nonlocal started
        for k in range(1, 40, 2):
            started += 1
            yield k, two_looks(agent, noted, k)

    done = [name for name, _, _ in side_by_side(questions(), 3)]
    assert done == list(range(1, 40, 2)) and begun == [6, 9, 12, 15, 18, 20, 20]
    assert noted.decoded == [(k, "coarse") for k in done]
    assert all(name.startswith("prefetch") for name in noted.threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_requests_of_one_question_share_a_pass_or_take_several(agent, noted):
    def windows(n):
        return (yield [noted.request(agent, k) for k in range(n)])

    [(_, answers, seconds)] = side_by_side([("long", windows(7))], 3)
    assert answers == list(range(7)) and [len(one) for one in noted.passes] == [3, 3, 1] and seconds > 0


def test_a_video_that_cannot_be_read_ends_its_question_alone_unless_it_goes_on(agent, noted):
    def careful(name):
        try:
            yield [noted.request(agent, f"broken-{name}")]
        except VideoError:
            [after] = yield [noted.request(agent, "instead")]
            return after

    def unopened(name):
        raise VideoError(name, "it is missing", "get it")
        yield

    questions = [("broken", two_broken(agent, noted)), ("careful", careful("c")), ("missing", unopened("m"))]
    questions.append((1, two_looks(agent, noted, 1)))
    found = {name: result for name, result, _ in side_by_side(questions, 2)}
    assert isinstance(found["broken"], VideoError) and "broken-b" in str(found["broken"])
    assert isinstance(found["missing"], VideoError)
    assert found["careful"] == "instead" and found[1] == [(1, "coarse")]


def two_broken(agent, noted):
    yield [noted.request(agent, "fine"), noted.request(agent, "broken-b")]
    pytest.fail("went on")


def test_models_do_not_share_a_pass(agent, noted):
    other = Agent(SimpleNamespace(device=torch.device("cpu")), None, agent.config)
    questions = [(k, two_looks(one, noted, k)) for k, one in ((1, agent), (3, other), (5, agent))]
    list(side_by_side(questions, 8))
    assert noted.passes == [[(1, "coarse"), (5, "coarse")], [(3, "coarse")]]


def test_an_error_of_a_pass_leaves_no_thread(agent, noted, monkeypatch):
    def failing(*_):
        raise RuntimeError("out of memory")

    noted.write = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        list(asking.side_by_side([(k, two_looks(agent, noted, k)) for k in range(9)], 2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
