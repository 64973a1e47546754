"""Work done in background threads before its results are asked for, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


class Prefetcher:
    """Results of jobs in order, computed in background threads up to `ahead` items before they are asked for.

    A job's exception is raised when its own result is asked for; the next call goes on with the next job. Use it as a
    context manager: on leaving, jobs that have not begun are dropped, and those at work are waited for.
    """

    def __init__(self, jobs: Iterable[Callable[[], object]], ahead: int = 2, workers: int = 1):
        self.jobs = iter(jobs)
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self.waiting: deque[Future] = deque()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self):
        while len(self.waiting) <= self.ahead and (future := self._start_next()) is not None:
            self.waiting.append(future)
        if not self.waiting:
            self.close()
            raise StopIteration
        return self.waiting.popleft().result()

    def _start_next(self) -> Future | None:
        try:
            return self.pool.submit(next(self.jobs))
        except StopIteration:
            return None
        except Exception as error:  # of the jobs' own iterator: it belongs to the item that could not be made
            self.jobs = iter(())
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self.jobs = iter(())
        self.waiting.clear()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def prefetch(jobs: Iterable[Callable[[], object]], ahead: int = 2, workers: int = 1) -> Prefetcher:
    """Results of `jobs` in order, computed in the background up to `ahead` items before they are asked for."""
    return Prefetcher(jobs, ahead, workers)
