"""The page of one answered question, parsed."""

import numpy as np
import pytest
from pagetree import Tree

from report import ReportError
from report.answer import answer_page


def one_look(kind, part, times, **changed):
    frames = np.zeros((len(times), 3, 28, 28), np.uint8)
    look = {"kind": kind, "part": part, "times": times, "frames": frames, "answer": "B", "confidence": 0.5}
    return {**look, "spans": [[1.0, 2.0]], "text": "<glue>[(1.0,2.0)]</glue>", **changed}


def answered(**changed):
    record = {
        "video": "a&b.mp4",
        "question": "Is 1 < 2?",
        "options": ["yes", "<no>"],
        "letters": {"A": 0.25, "B": 0.75},
        "answer": "B",
        "confidence": 0.5,
        "duration": 20.0,
        "begin": 0.0,
        "spans": [[1.0, 2.0], [9.0, 11.5]],
        "strategy": "coarse-to-fine",
        "cost": {"visual tokens": 88},
        "looks": [
            one_look("coarse", None, [float(k) for k in range(20)]),
            one_look("zoom", [(1.0, 2.0), (9.0, 11.5)], [1.0, 1.5, 8.99, 9.5, 10.0, 10.5, 11.0]),
        ],
    }
    return {**record, **changed}


def answer_tree(tmp_path, source="a%26b.mp4", **changed):
    answer_page(answered(**changed), tmp_path / "page.html", source)
    return Tree((tmp_path / "page.html").read_text()).root


def test_an_answer_page_has_a_jump_for_each_span(tmp_path):
    root = answer_tree(tmp_path)
    jumps = [(float(b.attrs["data-start"]), float(b.attrs["data-end"]), b.text) for b in root.all("button")]
    assert jumps == [(1.0, 2.0, "▸ 00:01.0–00:02.0"), (9.0, 11.5, "▸ 00:09.0–00:11.5")]
    boxes = [float(box.attrs["data-start"]) for box in root.all("div", "pred")]
    assert boxes == [1.0, 9.0]
    assert root.all("video")[0].attrs["src"] == "a%26b.mp4"


def test_an_answer_page_shows_the_zoomed_frames_of_each_span(tmp_path):
    zoomed = answer_tree(tmp_path).all("section")[1]
    assert [h.text for h in zoomed.all("h4")] == ["00:01.0–00:02.0", "00:09.0–00:11.5"]
    shown = [[float(f.attrs["data-time"]) for f in strip.all("figure")] for strip in zoomed.all("div", "strip")]
    assert shown == [[1.0, 1.5], [8.99, 9.5, 10.0, 10.5, 11.0]]


def test_an_answer_page_gives_each_option_its_share(tmp_path):
    items = answer_tree(tmp_path).all("ul", "letters")[0].all("li")
    assert [i.text for i in items] == ["A. yes25.0%", "B. <no>75.0%"]
    assert ["given" in i.attrs.get("class", "") for i in items] == [False, True]


def test_a_confidence_is_said_to_be_uncalibrated(tmp_path):
    for fields in ({}, {"options": [], "letters": {}, "answer": None}):
        facts = [p.text for p in answer_tree(tmp_path, **fields).all("p", "muted")]
        assert "confidence 50.0%: the model's own probability, uncalibrated" in facts


def test_an_answer_page_without_options_or_spans(tmp_path):
    root = answer_tree(tmp_path, options=[], letters={}, answer=None, confidence=0.0, spans=None)
    assert not root.all("ul", "letters") and not root.all("button")
    assert root.all("p", "answer")[0].text == "no span" and "confidence 0.0%" not in root.text
    root = answer_tree(tmp_path, options=[], letters={}, answer=None, confidence=0.42)
    assert root.all("p", "answer")[0].text == "00:01.0–00:02.0, 00:09.0–00:11.5" and "confidence 42.0%" in root.text


def test_a_letter_that_is_no_option_is_shown(tmp_path):
    root = answer_tree(tmp_path, answer="E", letters={"A": 0.25, "B": 0.25, "E": 0.5})
    assert root.all("p", "answer")[0].text == "E. (not an option)"
    assert len(root.all("ul", "letters")[0].all("li")) == 2 and not root.all("li", "given")


def test_looks_on_the_way_are_folded_up(tmp_path):
    coarse, zoomed = answered()["looks"]
    window = one_look("window", [(4.0, 8.0)], [4.0, 5.0, 6.0, 7.0])
    sections = answer_tree(tmp_path, looks=[coarse, window, zoomed]).all("section")
    assert [len(s.all("details")) for s in sections] == [0, 1, 0, 0]  # the last one is the cost
    assert sections[1].all("summary")[0].all("h3")[0].text == "A window: 00:04.0–00:08.0"
    assert len(sections[1].all("img")) == 4 and "from the start of what was shown" in sections[1].text
    assert "from the start of what was shown" not in sections[0].text


def test_an_agents_turns_are_on_the_time_line(tmp_path):
    turns = [
        one_look("glance", None, [0.0, 10.0], answer=None, text="<video_zoom>1", refusal=""),
        one_look("call", [(3.0, 5.0)], [3.0, 4.0], answer=None, text="<video_zoom>2", refusal=""),
        one_look("call", None, [], answer=None, text="<video_zoom>3", refusal="The video ends at 20.0 s, not <99>."),
        one_look("call", [(9.0, 10.0)], [9.0], text="<answer>B", refusal=""),
    ]
    turns[2]["frames"] = np.zeros((0, 3, 28, 28), np.uint8)
    root = answer_tree(tmp_path, looks=turns, spans=None, strategy="agent")
    line = root.all("div", "timeline")[0]
    assert [who.text for who in line.all("div", "who")] == ["turn 1", "turn 3"]
    assert [float(box.attrs["data-start"]) for box in line.all("div", "pred")] == [3.0, 9.0]
    *sections, _ = root.all("section")
    assert [len(section.all("img")) for section in sections] == [2, 2, 0, 1]
    assert ["answered B" in section.text for section in sections] == [False, False, False, True]
    assert "nothing was shown" in sections[2].text and "not <99>." in sections[2].text
    assert [section.all("pre")[0].text for section in sections] == [turn["text"] for turn in turns]


def test_frames_of_the_claimed_spans_are_marked(tmp_path):
    """From the start up to, not including, the end."""
    coarse, zoomed = answer_tree(tmp_path, spans=[[3.0, 5.0]]).all("section")[:2]
    marked = [float(f.attrs["data-time"]) for f in coarse.all("figure", "evidence")]
    assert marked == [3.0, 4.0] and not zoomed.all("figure", "evidence")


@pytest.mark.parametrize(("source", "media"), [("a.mp4", "'self' file:"), ("data:video/mp4;base64,AA==", "data:")])
def test_an_answer_pages_player_may_load_its_video_only(tmp_path, source, media):
    policy = next(m.attrs["content"] for m in answer_tree(tmp_path, source).all("meta") if "http-equiv" in m.attrs)
    assert "default-src 'none'" in policy and policy.endswith(f"media-src {media}")


def test_an_answer_page_names_the_look_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ReportError, match=r"look 1 \(window\): frames must be"):
        answer_tree(
            tmp_path, looks=[one_look("window", [(0.0, 2.0)], [0.0, 1.0], frames=np.zeros((1, 3, 28, 28), np.uint8))]
        )
