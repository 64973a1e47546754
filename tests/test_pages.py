"""pages.py: what the pages hold, parsed, and what a browser does with them."""

import base64
import doctest
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import page_in_browser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_report import result

import pages
from report import ReportError

deterministic = settings(derandomize=True, deadline=None, max_examples=60)
VOID = {"meta", "img", "br"}


class Node:
    def __init__(self, tag, attrs, parent):
        self.tag, self.attrs, self.parent, self.children = tag, attrs, parent, []

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag=None, cls=None):
        """Every node below with this tag and class, in document order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and (cls is None or cls in child.attrs.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found


class Tree(HTMLParser):
    """Parse a page into nodes; a tag that is closed in the wrong place or not at all is an error."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Node("root", {}, None)
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        node = Node(tag, dict(attrs), self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def parse(path):
    """A page's nodes, after the checks that every page must pass: well-formed and without any outside reference."""
    html = path.read_bytes().decode("utf-8")
    root = Tree(html).root
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    for node in root.all():
        assert not {"href", "srcset", "action"} & set(node.attrs)
        assert not [name for name in node.attrs if name.startswith("on")]
        assert node.attrs.get("src", "data:image/").startswith("data:image/")
    assert root.all("meta")[2].attrs["content"].startswith("default-src 'none'")
    return root


def place(node):
    """left and width of a box, in per cent."""
    return tuple(float(x) for x in re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", node.attrs["style"]).groups())


# Pieces


@deterministic
@given(st.floats(-1e5, 1e5))
def test_clock_is_right_to_a_tenth(seconds):
    sign, minutes, rest = re.fullmatch(r"(-?)(\d{2,}):([0-5]\d\.\d)", pages.clock(seconds)).groups()
    assert (-1 if sign else 1) * (int(minutes) * 60 + float(rest)) == pytest.approx(seconds, abs=0.0501)


def test_doctests():
    assert doctest.testmod(pages).failed == 0


def test_spans_lie_on_the_time_line_at_their_per_cent():
    root = Tree(pages.timeline([[2.5, 6.5]], {"r1": [[3, 8], [14, 19]], "r2": None, "r3": []}, 16.0)).root
    assert [place(n) for n in root.all(cls="true")] == [(15.625, 25.0)]
    assert [place(n) for n in root.all(cls="ghost")] == [(15.625, 25.0)] * 3
    first, cut = root.all(cls="pred")
    assert place(first) == (18.75, 31.25) and first.attrs["title"] == "00:03.0–00:08.0"
    assert place(cut) == (87.5, 12.5) and cut.attrs["title"] == "00:14.0–00:19.0"  # drawn cut off, labelled in full
    assert (cut.attrs["data-start"], cut.attrs["data-end"]) == ("14.0", "19.0")
    assert [n.text for n in root.all(cls="who")] == ["truth", "r1", "r2", "r3"]
    assert [n.text for n in root.all(cls="times")] == [
        "00:02.5–00:06.5", "00:03.0–00:08.0, 00:14.0–00:19.0", "no span", "empty"
    ]  # fmt: skip
    ticks = root.all("i")
    assert [(t.attrs["style"], t.text) for t in ticks[:2]] == [("left:0.000%", "00:00.0"), ("left:31.250%", "00:05.0")]
    assert [n.text for n in Tree(pages.timeline(None, {"r": []}, 2.0)).root.all(cls="who")] == ["r"]
    assert Tree(pages.timeline([], {}, 2.0)).root.all(cls="times")[0].text == "not annotated"


@deterministic
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), max_size=4), st.floats(0.1, 1e4))
def test_boxes_never_leave_the_time_line(spans, duration):
    for node in Tree(pages.bars(spans, duration, "pred")).root.all(cls="span"):
        left, width = place(node)
        assert 0 <= left <= 100 and width >= 0 and left + width <= 100.001


def test_the_end_of_the_time_line_has_a_label():
    ends = [Tree(pages.timeline(None, {"r": []}, duration)).root.all("i")[-1] for duration in (16.0, 20.0)]
    assert [(end.attrs["style"], end.text) for end in ends] == [
        ("left:100.000%", "00:16.0"),
        ("left:100.000%", "00:20.0"),
    ]


@pytest.mark.parametrize("duration", [0.3, 1, 16, 59.9, 754, 7200, 36000, 1e6])
def test_ticks_are_few_and_inside(duration):
    ticks = pages.tick_times(duration)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 7 and ticks[-1] < duration


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf")])
def test_a_time_line_needs_a_duration(duration):
    with pytest.raises(ReportError, match="positive duration"):
        pages.timeline([[0, 1]], {}, duration)


def decode(node):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", node.attrs["src"]).groups()
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1)


def test_small_frames_are_embedded_exactly_and_shown_larger_by_a_whole_factor():
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 28, 56), dtype=np.uint8)
    root = Tree(pages.film_strip(frames, [0.0, 0.5, 1.0], 136, [[0.5, 1.0]])).root  # the end does not belong to it
    for frame, image in zip(frames, root.all("img"), strict=True):
        kind, pixels = decode(image)
        assert kind == "png" and image.attrs["class"] == "small"
        np.testing.assert_array_equal(pixels, frame)
        assert (image.attrs["width"], image.attrs["height"]) == ("112", "56")
    assert [n.text for n in root.all("figcaption")] == ["00:00.0", "00:00.5", "00:01.0"]
    assert [n.attrs["class"] for n in root.all("figure")] == ["context", "evidence", "context"]
    assert "image-rendering: pixelated" in pages.STYLE.split(".small {")[1].split("}")[0]


def test_large_frames_shrink_and_long_clips_are_thinned_evenly():
    frames = np.full((1, 3, 700, 1400), 90, np.uint8)
    root = Tree(pages.film_strip(frames, [0.0], 136)).root
    kind, pixels = decode(root.all("img")[0])
    assert kind == "jpeg" and pixels.shape == (3, 160, 320) and abs(int(pixels.mean()) - 90) <= 1
    assert (root.all("img")[0].attrs["width"], root.all("img")[0].attrs["height"]) == ("136", "68")
    many = np.zeros((200, 3, 8, 8), np.uint8)
    root = Tree(pages.film_strip(many, list(range(200)), 136)).root
    times = [n.text for n in root.all("figcaption")]
    assert len(times) == pages.MAX_FRAMES and times[0] == "00:00.0" and times[-1] == "03:19.0"
    assert "48 of 200 frames shown" in root.text


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        (np.zeros((2, 3, 8, 8), np.float32), [0, 1]),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 1]),
        (np.zeros((2, 3, 8, 8), np.uint8), [0]),
    ],
)
def test_frames_of_another_shape_are_refused(frames, times):
    with pytest.raises(ReportError, match=r"uint8 \[N, 3, H, W\]"):
        pages.film_strip(frames, times, 100)


# Episodes

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def episode(**fields):
    clip = {"times": [0.0, 1.0, 2.0, 3.0], "frames": np.zeros((4, 3, 56, 56), np.uint8)}
    response = {
        "tokens": ["<th", "ink", ">", "red\n", "</think>", "<answer>", "C", "</answer>"],
        "advantages": [1.5, 0.75, 0.0, -0.75, -1.5, 0.3, 0.6, 0.9],
        "segments": ["think"] * 5 + ["answer"] * 3,
        "answer": "C",
        "spans": [[1.0, 2.0]],
        "rewards": {"format": 1.0, "iou": 0.625},
        "zoom": {"times": [1.0], "frames": np.zeros((1, 3, 112, 112), np.uint8), "answer": "A"},
    }
    failed = response | {"answer": None, "spans": None, "zoom": None, "tokens": list("abcdefgh")}
    whole = {"id": "e1", "video": "v.mp4", "question": HOSTILE, "options": ["<b>one</b>", "two", "three"]}
    whole |= {"answer": "C", "duration": 4.0, "glue": [[1.0, 3.0]], "coarse": clip, "responses": [response, failed]}
    return whole | fields


def episode_page(tmp_path, *episodes):
    pages.episodes_page(episodes, tmp_path / "new" / "page.html", "Step 1 <now>")
    return parse(tmp_path / "new" / "page.html")


def test_an_episode_shows_everything_and_executes_nothing(tmp_path):
    root = episode_page(tmp_path, episode())
    assert root.all("h1")[0].text == root.all("title")[0].text == "Step 1 <now>"
    assert root.all("h2")[0].text == HOSTILE and not root.all("script") and not root.all("b")
    assert [n.text for n in root.all("li")] == ["A. <b>one</b>", "B. two", "C. three ✓"]
    assert [n.text for n in root.all("li", "right")] == ["C. three ✓"]
    article = root.all("article")[0]
    assert [place(n) for n in article.all(cls="true")] == [(25.0, 50.0)]
    assert [place(n) for n in article.all(cls="pred")] == [(25.0, 25.0)]
    assert len(article.all("img")) == 4 + 1
    first, second = article.all("section")
    assert "answered C ✓" in first.text and "Zoom pass: answered A ✗" in first.text
    assert "answered none ✗" in second.text and "no span" in second.text and "No zoom pass" in second.text
    rewards, means = ([[c.text for c in r.all()] for r in t.all("tr")] for t in first.all("table"))
    assert rewards == [["format", "iou"], ["1.00", "0.62"]]
    assert means == [["think", "answer"], ["+0.00", "+0.60"]]


def test_tokens_carry_their_advantage_in_colour_line_and_title(tmp_path):
    tokens = episode_page(tmp_path, episode()).all("section")[0].all(cls="tok")
    assert [t.text for t in tokens] == ["<th", "ink", ">", "red↵\n", "</think>", "<answer>", "C", "</answer>"]
    assert [t.attrs["class"].split()[1] for t in tokens[:5]] == ["pos", "pos", "zero", "neg", "neg"]
    assert tokens[0].attrs["title"] == "think: +1.500" and tokens[3].attrs["title"] == "think: -0.750"
    colours = [tuple(map(int, re.findall(r"\d+", t.attrs["style"]))) for t in tokens]
    assert colours[2] == (255, 255, 255)
    # Full colour is 60% of the hue on white, half the advantage half of that: 255 + 0.6 * (33 - 255) = 121.8.
    assert colours[0] == (122, 163, 205) and colours[1] == (188, 209, 230)
    assert colours[4] == (236, 169, 108) and colours[3] == (246, 212, 182)
    assert re.search(r"\.neg \{ text-decoration: underline", pages.EPISODE_STYLE)


def test_one_colour_scale_for_the_whole_page(tmp_path):
    weak = episode(id="e2")
    weak["responses"] = [{**weak["responses"][0], "advantages": [0.1] * 8}]
    root = episode_page(tmp_path, episode(), weak)
    assert root.all("article")[1].all(cls="tok")[0].attrs["style"] == "background:rgb(246,249,252)"
    assert "±1.50" in root.all(cls="legend")[0].text


def test_segments_and_truth_may_be_absent_and_zero_advantages_stay_white(tmp_path):
    bare = episode(glue=[], answer="a dog", options=[])
    bare["responses"] = [{**bare["responses"][1], "advantages": [0.0] * 8}]
    del bare["responses"][0]["segments"]
    root = episode_page(tmp_path, bare)
    assert {t.attrs["style"] for t in root.all("section")[0].all(cls="tok")} == {"background:rgb(255,255,255)"}
    assert root.all("section")[0].all(cls="tok")[0].attrs["title"] == "+0.000"
    assert [n.text for n in root.all("li")] == ["Answer: a dog"] and len(root.all("section")[0].all("table")) == 1


@deterministic
@given(st.text(max_size=30), st.lists(st.text(st.sampled_from("<>&\"'/ab\n -!="), max_size=8), min_size=1, max_size=8))
def test_no_text_breaks_out_of_its_place(tmp_path_factory, question, tokens):
    question = question.replace("\r", "").replace("\0", "")  # browsers and parsers normalise these two
    bold = episode(question=question, id=question, video=question, options=tokens)
    named = {**bold["responses"][0], "tokens": tokens, "advantages": [1.0] * len(tokens), "segments": tokens}
    bold["responses"] = [{**named, "rewards": {token: 1.0 for token in tokens}, "answer": tokens[0]}]
    root = episode_page(tmp_path_factory.mktemp("page"), bold)
    assert root.all("h2")[0].text == question and root.all("article")[0].attrs["id"] == question
    assert "".join(t.text for t in root.all("section")[0].all(cls="tok")).replace("↵", "") == "".join(tokens)


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    root = episode_page(tmp_path, episode(question="broken \ud83d here"))
    assert re.fullmatch("broken . here", root.all("h2")[0].text)


def test_the_same_episodes_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        pages.episodes_page([episode()], tmp_path / name, "t")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": [1.0]}, "episode e1: response 1: 8 tokens, 1 advantages and 8 segments"),
        ({"segments": ["think"]}, "episode e1: response 1: 8 tokens, 8 advantages and 1 segments"),
        ({"advantages": [float("nan")] * 8}, "episode e1: response 1: an advantage is not finite"),
        ({"spans": [[0, float("inf")]]}, "episode e1: inf is not a time"),
    ],
)
def test_a_response_that_does_not_fit_is_named(tmp_path, change, message):
    wrong = episode()
    wrong["responses"][0] |= change
    with pytest.raises(ReportError, match=message):
        episode_page(tmp_path, wrong)


def test_a_missing_field_is_named(tmp_path):
    for field in ("glue", "coarse", "responses", "question"):
        wrong = episode()
        del wrong[field]
        with pytest.raises(ReportError, match=f"episode e1: no field '{field}'"):
            episode_page(tmp_path, wrong)
    with pytest.raises(ReportError, match="episode e1: a time line needs"):
        episode_page(tmp_path, episode(duration=0))


# Evaluation


def evaluation(tmp_path, rows, summary=None):
    pages.evaluation_page(rows, tmp_path / "new" / "eval.html", "Results & more", summary or {"mIoU": 0.5})
    return parse(tmp_path / "new" / "eval.html")


def test_rows_carry_the_keys_they_are_sorted_by(tmp_path):
    rows = [
        result(1, [[5, 10], [8, 12]], 0.25, question=HOSTILE, spans=[[4, 8]]),
        result(2, [], None, answer=None, predicted_answer=None, zoom_answer=None, spans=None, kind=None, duration=7.5),
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
    assert script.text == pages.SORT_SCRIPT
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
    del wrong["spans"]
    with pytest.raises(ReportError, match=r"row 2 \(q2\): no field 'spans'"):
        evaluation(tmp_path, [result(1, [[0, 1]], 1.0), wrong])
    with pytest.raises(ReportError, match=r"row 1 \(q1\): a time line needs a positive duration"):
        evaluation(tmp_path, [result(1, [[0, 1]], 1.0, duration=0)])


# ---------------------------------------------------------------------------------------------------------------------
# A question about one video
# ---------------------------------------------------------------------------------------------------------------------


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
    pages.answer_page(answered(**changed), tmp_path / "page.html", source)
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


def test_frames_of_the_claimed_spans_are_underlined(tmp_path):
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
