"""The page of an evaluation, parsed and in a browser."""

import pytest
from conftest import page_in_browser
from pagetree import HOSTILE, parse, place
from scored import result

from report import ReportError
from report.evaluation import evaluation_page, page_videos, words_of
from report.html import beside


def evaluation(tmp_path, rows, summary=None):
    evaluation_page({"policy": rows}, tmp_path / "new" / "eval.html", "Results & more", summary or {"mIoU": 0.5})
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
    assert script.text == beside("sort.js") + beside("look.js")
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


def two_results():
    """Five questions: right in both, right now, no longer right, without a span, and without a known answer."""
    before = [result(n, [[4, 8]], 0.5, zoom_answer=letter) for n, letter in enumerate("ABAAB")]
    after = [result(n, [[4, 8]], 0.5, zoom_answer=letter) for n, letter in enumerate("AABBB")]
    after[3] |= {"predicted": None, "iou": 0.0}
    for rows in (before, after):
        rows[4] |= {"answer": None}
    return {"before": before, "<after>": after}


def test_several_results_stand_side_by_side(tmp_path):
    evaluation_page(two_results(), tmp_path / "eval.html", "Two", {"mIoU": 0.5})
    root = parse(tmp_path / "eval.html")
    table = root.all("table", "results")[0]
    second = table.all("tbody")[0].all("tr")[1]
    zoomed = second.all("td")[4]
    assert [one.text for one in zoomed.all("div", "one")] == ["before B ✗", "<after> A ✓"]
    assert zoomed.attrs["data-sort"] == "1"  # the last one sorts
    assert len(second.all(cls="true")) == 1 and len(second.all(cls="pred")) == 2
    times = [f"{name} 00:04.0–00:08.0" for name in ("true", "before", "<after>")]
    assert second.all("td")[-1].text == " | ".join(times)
    assert "right: by the last answer of <after>; without options, an IoU" in root.all(cls="legend")[0].text


FILTER = """
const shown = () => [...document.querySelectorAll("table.results tbody tr")].filter(row => !row.hidden).length;
const seen = [];
for (const button of document.querySelectorAll("[data-filter]")) {
  button.click();
  seen.push(button.textContent + " = " + shown() + (button.getAttribute("aria-pressed") === "true" ? "" : "?"));
}
document.title = seen.join(", ");
"""


def test_a_filter_shows_its_questions_in_a_browser(tmp_path):
    evaluation_page(two_results(), tmp_path / "eval.html", "Two", {"mIoU": 0.5})
    names = ["all 5 = 5", "right 3 = 3", "wrong 2 = 2", "without a span 1 = 1"]
    names += ["better than before 1 = 1", "worse than before 2 = 2"]
    assert page_in_browser(tmp_path / "eval.html", FILTER) == ", ".join(names)


def test_a_filter_names_the_result_that_it_compares_with(tmp_path):
    before, after = two_results().values()
    evaluation_page({"<one-stage>": before, "agent": after}, tmp_path / "eval.html", "Two", {"mIoU": 0.5})
    buttons = [one.text for one in parse(tmp_path / "eval.html").all("p", "filters")[0].all("button")]
    assert buttons[-2:] == ["better than <one-stage> 1", "worse than <one-stage> 2"]


def test_words_of_questions():
    words = [words_of(dict(zip(("a", "b"), pair, strict=True))) for pair in zip(*two_results().values(), strict=True)]
    assert words == [["right"], ["right", "better"], ["wrong", "worse"], ["wrong", "no-span", "worse"], ["right"]]
    assert words_of({"a": result(1, [], None, answer=None)}) == []  # nothing is known of it
    assert words_of({"a": result(1, [[0, 1]], 0.4, answer=None)}) == ["wrong"]  # a question about spans alone


LOOK = """
const details = document.querySelector("details[data-video]");
const video = () => details.querySelector("video");
const shows = time => settled(() => !video().seeking && video().currentTime, time);
(async () => {
  let played = false;
  HTMLMediaElement.prototype.play = () => { played = true; return Promise.resolve(); };  // stay where a click led
  document.querySelector(".results .pred").click();
  const start = await shows(3);
  const frames = [...details.querySelectorAll("figure")];
  frames[7].click();
  const moment = await shows(18.75);
  const marked = frames.filter(figure => figure.className === "evidence").map(figure => figure.dataset.time);
  const tall = frames[0].querySelector("img").naturalHeight;
  document.title = [details.open, played, start, moment, marked.join(" "), tall].join(", ");
})();
"""


def test_a_row_opens_with_frames_and_a_player_in_a_browser(tmp_path, samples):
    """A click on a span seeks to it, one on a frame to its moment; frames within the true spans are marked."""
    sample = samples[0]
    row = result(1, [[2.0, 8.0]], 1.0, video=sample.video, predicted=[[3.0, 6.0]])
    videos = page_videos([sample.video, str(tmp_path / "missing.mp4"), sample.video], tmp_path / "eval.html")
    assert list(videos) == [sample.video] and videos[sample.video]["times"][:2] == [1.25, 3.75]
    evaluation_page({"policy": [row]}, tmp_path / "eval.html", "One", {"mIoU": 1.0}, videos)
    title = page_in_browser(tmp_path / "eval.html", LOOK)
    assert title == "true, true, 3, 18.75, 3.75 6.25, 112"


def test_an_unreadable_video_has_a_player_but_no_frames(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    videos = page_videos([str(tmp_path / "broken.mp4")], tmp_path / "eval.html")
    assert videos == {str(tmp_path / "broken.mp4"): {"source": "broken.mp4", "begin": 0.0, "times": [], "frames": None}}


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
