"""What must hold for all inputs, checked on a hundred drawn cases, the same in every run."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES, AT_ONCE = 10, 10  # what hypothesis does for an example takes longer than to draw a case, so one has several


def for_all(*strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Makes a test of a function that checks one case: a value of each strategy."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def test(cases):
            for case in cases:
                check(*case)

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):  # without its signature
            setattr(test, name, getattr(check, name))
        cases = st.tuples(*[st.tuples(*strategies)] * AT_ONCE)
        return settings(derandomize=True, deadline=None, max_examples=EXAMPLES)(given(cases)(test))

    return decorate
