"""What the tests of pictures share."""

import pytest

from report import drawing


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been written."""
    caught = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, out: caught.append(figure))
    return caught
