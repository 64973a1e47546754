"""The page of an evaluation, parsed and in a browser."""

import pytest
from conftest import page_in_browser
from pagetree import HOSTILE, parse, place
from scored import result

from report import ReportError
from report.evaluation import evaluation_page
from report.html import beside


def evaluation(tmp_path, rows, summary=None):
    evaluation_page(rows, tmp_path / "new" / "eval.html", "Results & more", summary or {"mIoU": 0.5})
    return parse(tmp_path / "new" / "eval.html")


def test_rows_carry_the_keys_they_are_sorted_by(tmp_path):
    rows = [
        result(1, [[5, 10], [8, 12]], 0.25, question=HOSTILE, predicted=[[4, 8]]),
        result(
            2, [], None, answer=None, predicted_answer=None, zoom_answer=None, predicted=None, kind=None, duration=7.5
        ),
        result(3, [[1, 2]], 0.0, duration=None),
    ]
    root = evaluation(tmp_path, rows)
    table = root.all("table", "results")[0]
    heads = table.all("th")
    assert [h.text for h in heads] == [
        "Question", "Kind", "True", "Answered", "Zoomed", "IoU", "Evidence (s)", "Length", "Time line"
    ]  # fmt: skip
    assert all(h.all("button") and h.attrs["aria-sort"] == "none" for h in heads[:-1])
    assert not heads[-1].all("button")
    keys = [[c.attrs.get("data-sort") for c in r.all("td")] for r in table.all("tbody")[0].all("tr")]
    assert keys[0] == [HOSTILE, "fine", "A", "0", "1", "0.25", "7.0", "20.0", None]
    assert keys[1] == ["What?", "", "", "", "", "", "", "7.5", None]
    for row in keys:
        for head, key in zip(heads, row, strict=True):
            if head.attrs.get("data-type") == "number" and key:
                float(key)
    cells = [[c.text for c in r.all("td")] for r in table.all("tbody")[0].all("tr")]
    assert cells[0][3:8] == ["B ✗", "A ✓", "0.250", "7.0", "00:20.0"]
    assert cells[1][1:8] == ["–", "–", "–", "–", "–", "–", "00:07.5"]
    assert cells[0][8] == "00:05.0–00:10.0, 00:08.0–00:12.0 | 00:04.0–00:08.0"
    assert cells[1][8] == "not annotated | no span"
    assert keys[2][7] == "" and cells[2][7:] == ["–", "00:01.0–00:02.0 | 00:01.0–00:02.0"]
    assert [place(n) for n in table.all(cls="true")] == [(25.0, 25.0), (40.0, 20.0)]
    assert [place(n) for n in table.all(cls="pred")] == [(20.0, 20.0)]
    assert [c.attrs["data-label"] for c in table.all("tr")[1].all("td")] == [h.text for h in heads]


def test_columns_that_no_row_has_anything_for_are_left_out(tmp_path):
    rows = [result(k, [[0, 1]], 1.0, answer=None, predicted_answer=None, kind="") for k in range(2)]
    for row in rows:
        del row["zoom_answer"]
    table = evaluation(tmp_path, rows).all("table", "results")[0]
    assert [h.text for h in table.all("th")] == ["Question", "IoU", "Evidence (s)", "Length", "Time line"]
    assert [c.attrs["data-label"] for c in table.all("tr")[1].all("td")] == [h.text for h in table.all("th")]
    rows[1]["predicted_answer"] = "B"  # a given answer, though the right one is not known
    table = evaluation(tmp_path, rows).all("table", "results")[0]
    assert [c.text for c in table.all("tr")[2].all("td")][1] == "B"


def test_the_sorting_script_is_on_the_page_and_uses_these_names(tmp_path):
    root = evaluation(tmp_path, [result(1, [[0, 1]], 1.0)])
    (script,) = root.all("script")
    assert script.text == beside("sort.js")
    for name in ("table.results th button", "dataset.sort", "dataset.type", "aria-sort"):
        assert name in script.text


SORT = """
const heads = [...document.querySelectorAll("table.results th button")];
const rows = () => [...document.querySelectorAll("table.results tbody tr")];
const orders = [];
for (const name of ["IoU", "IoU", "Question"]) {
  heads.find(head => head.textContent === name).click();
  orders.push(rows().map(row => row.cells[5].dataset.sort || "-").join(" "));
}
document.title = orders.join(", ");
"""


def test_a_click_on_a_heading_sorts_in_a_browser(tmp_path):
    """Numbers not as texts, backwards on the second click, rows without a value at the end."""
    scores = {"c": 0.5, "a": None, "e": 0.25, "d": 10.0, "b": 0.0}
    rows = [result(q, [[0, 1]] if s is not None else [], s, question=q) for q, s in scores.items()]
    evaluation(tmp_path, rows)
    title = page_in_browser(tmp_path / "new" / "eval.html", SORT)
    assert title == "0.0 0.25 0.5 10.0 -, 10.0 0.5 0.25 0.0 -, - 0.0 0.5 10.0 0.25"


def test_summary_of_one_line_and_of_several(tmp_path):
    def cells(summary):
        table = evaluation(tmp_path, [], summary).all("table", "summary")[0]
        return [[c.text for c in r.children] for r in table.all("tr")]

    assert cells({"mIoU": 0.51234, "questions": 120}) == [["", "mIoU", "questions"], ["", "0.512", "120"]]
    assert cells({"before": {"mIoU": 0.5}, "<after>": {"mIoU": 0.8, "R@0.5": "0.9 ± 0.1"}}) == [
        ["", "mIoU", "R@0.5"],
        ["before", "0.500", "–"],
        ["<after>", "0.800", "0.9 ± 0.1"],
    ]


def test_a_row_that_lacks_a_field_or_a_duration_is_named(tmp_path):
    wrong = result(2, [[0, 1]], 1.0)
    del wrong["predicted"]
    with pytest.raises(ReportError, match=r"row 2 \(q2\): no field 'predicted'"):
        evaluation(tmp_path, [result(1, [[0, 1]], 1.0), wrong])
    with pytest.raises(ReportError, match=r"row 1 \(q1\): a time line needs a positive duration"):
        evaluation(tmp_path, [result(1, [[0, 1]], 1.0, duration=0)])
