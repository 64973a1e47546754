"""Working ahead: order, errors, bounds."""

import random
import threading
import time

import pytest

from media.file import VideoError
from media.prefetch import Prefetcher, prefetch


def test_prefetch_keeps_the_order():
    rng = random.Random(0)
    delays = [rng.random() / 200 for _ in range(40)]
    jobs = [lambda k=k, s=s: (time.sleep(s), k)[1] for k, s in enumerate(delays)]
    with prefetch(jobs, ahead=5, workers=4) as results:
        assert list(results) == list(range(40))


def test_prefetch_raises_where_it_belongs():
    def job(k):
        if k == 2:
            raise VideoError("b.mp4", "damaged", "get it again")
        return k

    with prefetch([lambda k=k: job(k) for k in range(5)], ahead=4) as results:
        assert next(results) == 0 and next(results) == 1
        with pytest.raises(VideoError, match=r"b\.mp4"):
            next(results)
        assert list(results) == [3, 4]


def test_prefetch_raises_the_error_of_its_jobs_iterator_in_turn():
    def jobs():
        yield lambda: 1
        yield lambda: 2
        raise KeyError("sample 3")

    results = prefetch(jobs(), ahead=5)
    assert next(results) == 1 and next(results) == 2
    with pytest.raises(KeyError, match="sample 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_prefetch_is_bounded():
    started = []
    with Prefetcher((lambda k=k: started.append(k) for k in range(100)), ahead=3) as results:
        for _ in range(10):
            next(results)
        time.sleep(0.05)
        assert len(started) <= 10 + 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_prefetch_leaves_nothing_behind(error):
    before = threading.active_count()
    begun = []
    with (
        pytest.raises(error),
        prefetch([lambda k=k: (begun.append(k), time.sleep(0.01)) for k in range(50)], ahead=20) as results,
    ):
        next(results)
        raise error
    assert threading.active_count() == before and len(begun) < 50
