"""Templates against the papers' wording, parsers on anything a policy may write, the strict check on deviations."""

import math
import time

import pytest
from hypothesis import strategies as st
from properties import for_all
from qwen import CHATS

from prompts import (
    LETTERS,
    Limits,
    ToolCall,
    chat_text,
    coarse_text,
    format_ok,
    parse_answer,
    parse_spans,
    parse_think,
    parse_time_mentions,
    parse_tool_call,
    strip_times,
    tag_ranges,
    time_text,
    zoom_text,
)

WORLD = "<think>red<time>(3.0,8.0)</time></think><answer>B</answer><glue>[(3.0,8.0)]</glue>"
# Zoom-Zero, Figure 5, without the stray "<n" of its print
FIGURE_5 = (
    "<think>First, the video introduces the topic of fishing lures with an opening screen <time> (20.3, 49.7) </time>. "
    "Next, several men showcase the different lures they are using for ice fishing <time> (283.5, 304.2) </time>."
    "</think>"
    "<answer>B</answer><glue>[(20.3, 49.7), (283.5, 304.2), (593.1, 611.4), (673.8, 680.2)]</glue>"
)
SECTION_4_2 = "<answer>A</answer><glue> [(20.3, 30.8)]</glue>"  # the example inside Zoom-Zero's prompt
LONGVTG = "<think>The dog jumps near the end.</think>\n<answer>C</answer>\n<timestamp>12.5 to 30.0</timestamp>"
CALL = '<video_zoom>{"segment": [12.0, 20.5], "fps": 2}</video_zoom>'

# text made of the pieces that matter, so that hypothesis finds nested, repeated and broken tags
TAGS = [
    f"<{slash}{tag}>" for tag in ("think", "answer", "glue", "time", "timestamp", "video_zoom") for slash in ("", "/")
]
MARKS = ["<", ">", "</", "[", "]", "(", ")", "{", "}", ", ", "-", ":", "\n", " "]
WORDS = ["3.0", "8", "1e9", "1e999", "nan", "inf", "１２", " to ", "s", "A", "b", '"fps"']
PIECES = TAGS + MARKS + WORDS


def piece(drawn: int) -> str:
    """Half of the time a piece, else a character: an early one, or any but half a pair. One number each is drawn fast;
    st.text would first tell all characters into categories, which takes seconds.
    """
    kind, k = drawn % 4, drawn // 4
    if kind < 2:
        return PIECES[k % len(PIECES)]
    code = k % 256 if kind == 2 else k % 0x10F800
    return chr(code if code < 0xD800 else code + 0x800)


MESSY = st.lists(st.integers(0, 2**24 - 1).map(piece), max_size=40).map("".join)


# --- what is said to the model


def test_templates_say_what_the_papers_say():
    zoom_zero = coarse_text("zoom_zero", "Why?", ["rain", "sun"])
    assert zoom_zero.startswith(
        "Answer the question: Why? according to the content of the video. Select the answer from: "
    )
    assert "Select the answer from: (A) rain (B) sun. Output key information" in zoom_zero
    assert zoom_zero.endswith("[(s1, e1), (s2, e2), ...]. For example: <answer>A</answer><glue> [(20.3, 30.8)]</glue>.")
    longvtg = coarse_text("longvtg_r1", "Why?", ["rain", "sun"])
    assert longvtg.startswith('Locate the video clip that is relevant to the question: "Why? (A) rain (B) sun"\nOutput')
    assert longvtg.endswith("(in seconds, precise to one decimal places) within the <timestamp> </timestamp> tags.")
    asked = coarse_text("longvtg_r1", "Where is my cup?", [], event=False)
    assert asked == longvtg.replace("Why? (A) rain (B) sun", "Where is my cup?")
    event = coarse_text("longvtg_r1", "dog jumps", [])
    assert event.startswith(
        'To accurately pinpoint the event "dog jumps" in the video, determine the precise time period'
    )
    assert "<answer>" not in event and event.endswith("within the <timestamp> </timestamp> tags.")


def test_world_template_is_terse():
    options = ["rows", "dots", "checks", "columns"]
    assert coarse_text("world", "red ?", options) == "red ? A rows B dots C checks D columns"
    assert zoom_text("world", "red ?", options) == "red ? A rows B dots C checks D columns zoom"


def test_videozoomer_template_states_its_limits_and_a_valid_call():
    text = coarse_text("videozoomer", "Why?", ["rain", "sun"], limits=Limits(6, 3, 8, 100))
    assert text.startswith("You see a coarse overview of a video. Question: Why?\nOptions: (A) rain")
    assert text.endswith("give the letter of the option within <answer> </answer> tags instead of a call.")
    assert (
        "at most 6 turns, 3 calls" in text
        and "at most 8." in text
        and "100 frames with" in text
        and "(A) rain (B) sun" in text
    )
    start, end = tag_ranges(text, "video_zoom")[0]
    assert parse_tool_call(text[start:end]) == ToolCall((12.0, 16.0), 2.0)
    default = coarse_text("videozoomer", "Why?", ["rain", "sun"])
    assert "at most 5 turns, 4 calls" in default and "at most 16." in default and "128 frames" in default
    assert coarse_text("world_zoomer", "red ?", ["rows", "dots"]) == (
        "red ? A rows B dots turns 5 calls 4 frames 16 of 128"
    )


def test_duration_sentence_comes_first_when_given():
    text = coarse_text("zoom_zero", "Why?", ["rain"], duration=31.25)
    assert text == "This video in total has 31.2 seconds. " + coarse_text("zoom_zero", "Why?", ["rain"])


def test_zoom_text_asks_for_the_letter_and_shows_think_without_times():
    assert zoom_text("zoom_zero", "Why?", ["rain", "sun"]) == (
        "Why?\n(A) rain (B) sun\nRespond with only the letter of the option."
    )
    shown = zoom_text("zoom_zero", "Why?", ["rain", "sun"], think="It rains <time>(3.0, 8.0)</time>.")
    assert shown == "It rains.\nWhy?\n(A) rain (B) sun\nRespond with only the letter of the option."


def test_times_have_hundredths_however_late():
    times = [0.0, 3.0, 3.5, 12.346, 10.0, 10800.125, 36000.0]
    assert [time_text(time) for time in times] == ["0", "3", "3.5", "12.35", "10", "10800.12", "36000"]


def test_braces_in_questions_and_options_survive():
    assert "{x} (A) {0} (B) {}" in coarse_text("longvtg_r1", "{x}", ["{0}", "{}"])


def test_bad_prompts_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="unknown template 'zoom': choose one of zoom_zero, longvtg_r1"):
        coarse_text("zoom", "Why?", ["rain"])
    with pytest.raises(ValueError, match="unknown template"):
        zoom_text("zoom", "Why?", ["rain"])
    with pytest.raises(ValueError, match="unknown template"):
        format_ok(WORLD, "zoom")
    for template in ("zoom_zero", "videozoomer", "world"):
        with pytest.raises(ValueError, match="needs options, question 'Why' has none"):
            coarse_text(template, "Why", [])
    with pytest.raises(ValueError, match="needs options"):
        zoom_text("longvtg_r1", "Why", [])
    assert "(Z) z" in coarse_text("zoom_zero", "Why?", list(LETTERS.lower()))
    with pytest.raises(ValueError, match="27 options, but only 26 letters"):
        coarse_text("zoom_zero", "Why?", ["x"] * 27)


@pytest.mark.parametrize("n_videos", [0, 1, 2])
@pytest.mark.parametrize("system", ["You are a helpful assistant.", "Be brief."])
def test_chat_text_is_what_the_real_chat_template_renders(n_videos, system):
    rendered = {(videos, prompt): text for videos, prompt, text in CHATS}
    assert chat_text("Why?", n_videos, system) == rendered[n_videos, system]
    if system == "You are a helpful assistant.":
        assert chat_text("Why?", n_videos) == rendered[n_videos, None]


def test_chat_text_by_hand():
    user = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_text("Why?", system=None) == user
    after = "<|im_start|>user\nWhy?<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    assert chat_text("Why?", system=None, text_first=True) == after
    assert chat_text("Why?", system="Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + user


# --- tags


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("no tag", []),
        ("a<glue>x</glue>b", ["<glue>x</glue>"]),
        ("<glue>x</glue><glue>y</glue>", ["<glue>x</glue>", "<glue>y</glue>"]),
        ("<glue><glue>x</glue></glue>", ["<glue><glue>x</glue>"]),  # up to the first closing
        ("a<glue>x", ["<glue>x"]),  # unclosed: to the end
        ("<glue>x</glue>a<glue>y", ["<glue>x</glue>", "<glue>y"]),
        ("</glue>x<glue></glue>", ["<glue></glue>"]),
        ("<glue >x</glue>", []),
        ("<glue>x/glue>y</glue>", ["<glue>x/glue>y</glue>"]),
    ],
)
def test_tag_ranges(text, pieces):
    assert [text[start:end] for start, end in tag_ranges(text, "glue")] == pieces


@for_all(MESSY)
def test_tag_ranges_are_disjoint_sorted_and_begin_and_end_with_the_tags(text):
    position = 0
    for start, end in tag_ranges(text, "glue"):
        assert position <= start < end <= len(text)
        piece = text[start:end]
        assert piece.startswith("<glue>")
        closed = piece.endswith("</glue>") and piece.count("</glue>") == 1
        assert closed or ("</glue>" not in piece and end == len(text))
        assert "<glue>" not in text[position:start]
        position = end
    assert "<glue>" not in text[position:]


# --- spans


@pytest.mark.parametrize(
    ("content", "spans"),
    [
        ("[(3.0,8.0)]", [(3, 8)]),
        (" [(20.3, 30.8)]", [(20.3, 30.8)]),
        ("[(3.0,8.0), (9.5, 12)]", [(3, 8), (9.5, 12)]),
        ("[(9, 12), (3, 8)]", [(9, 12), (3, 8)]),  # order is kept
        ("[[1.0, 2.0]]", [(1, 2)]),
        ("[ ( 1.0 , 2.0 ) ]", [(1, 2)]),
        ("(1, 2); (3, 4)", [(1, 2), (3, 4)]),
        ("{1, 2}, {3, 4}", [(1, 2), (3, 4)]),
        ("1-2, 3-4", [(1, 2), (3, 4)]),
        ("1, 2, 3, 4", [(1, 2), (3, 4)]),
        ("1-2 and 3-4", [(1, 2), (3, 4)]),
        ("12.5 to 30.0", [(12.5, 30)]),
        ("12.5s to 30.0s", [(12.5, 30)]),
        ("12.5 sec - 30 seconds", [(12.5, 30)]),
        ("1 second to 2 secs", [(1, 2)]),
        ("From 3.0 to 10.5 seconds.", [(3, 10.5)]),
        ("3 until 4", [(3, 4)]),
        ("8-11", [(8, 11)]),
        ("8–11", [(8, 11)]),
        ("00:12 - 00:30", [(12, 30)]),
        ("1:02:05.5 - 102:07", [(3725.5, 6127)]),
        ("(5, 5)", [(5, 5)]),
        ("(0, 5)", [(0, 5)]),
        ("(1e1, 2E+1)", [(10, 20)]),
        ("(1e9, 2e9)", [(1e9, 2e9)]),
        ("(3., 4.)", [(3, 4)]),
        ("[]", []),
        (" [ ] ", []),
        # unreadable as a whole
        ("", None),
        ("  ", None),
        ("()", None),
        ("nothing", None),
        ("12.5", None),
        ("(1, 2), (3)", None),
        ("(1), (2, 3, 4)", None),
        ("(8, 3)", None),
        ("(1, 2), (8, 3)", None),
        ("(-1, 3)", None),
        ("(1, -3)", None),
        ("(nan, 3)", None),
        ("(3, inf)", None),
        ("(1, 1e999)", None),
        ("(1e999, 1e999)", None),
        ("(1 2)", None),
        ("(1, 2) maybe", None),
        ("(1.2.3, 4)", None),
        ("(0:75, 2:00)", None),
        ("0:01:02:03 - 9:00:00", None),
        ("(１２, １５)", None),
        ("(1, 2", [(1, 2)]),
    ],
)
def test_parse_spans(content, spans):
    assert parse_spans(f"<glue>{content}</glue>") == spans
    assert parse_spans(f"<timestamp>{content}</timestamp>") == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("(3, 8)", None),  # no tag
        ("<glue>[(3, 8)", None),  # unclosed: the last number may be cut
        ("<glue>(1, 2)</glue><glue>(3, 4)</glue>", [(1, 2)]),
        ("<think><glue>(1, 2)</glue></think><glue>(3, 4)</glue>", [(3, 4)]),
        ("<think><glue>(1, 2)</glue></think>", None),
        ("<glue><glue>(1, 2)</glue></glue>", None),
        ("<timestamp>(1, 2)</timestamp><glue>(3, 4)</glue>", [(3, 4)]),
        (WORLD, [(3, 8)]),
        (LONGVTG, [(12.5, 30)]),
    ],
)
def test_which_spans_count(text, spans):
    assert parse_spans(text) == spans


def test_spans_are_floats():
    assert all(isinstance(t, float) for t in parse_spans("<glue>(1, 0:02)</glue>")[0])


@for_all(st.lists(st.floats(0, 1e6), max_size=16))
def test_written_spans_are_read_back(times):
    spans = [(min(pair), max(pair)) for pair in zip(times[::2], times[1::2], strict=False)]
    for text in (str(spans), str([list(span) for span in spans]), str(spans).replace(" ", "")):
        assert parse_spans(f"<glue>{text}</glue>") == spans


@for_all(MESSY)
def test_parsers_never_raise_and_return_what_they_promise(text):
    for wrapped in (text, f"<glue>{text}</glue>", f"<answer>{text}</answer>", f"<video_zoom>{text}</video_zoom>"):
        spans = parse_spans(wrapped)
        assert spans is None or all(0 <= start <= end < math.inf for start, end in spans)
        assert all(0 <= start <= end < math.inf for start, end in parse_time_mentions(wrapped))
        for answer in (parse_answer(wrapped), parse_answer(wrapped, bare=True)):
            assert answer is None or answer in LETTERS
        call = parse_tool_call(wrapped)
        assert call is None or isinstance(call, str) or 0 <= call.span[0] < call.span[1]
        tried = "<video_zoom>" in wrapped.rpartition("</think>")[2] or wrapped.rstrip().endswith("</video_zoom>")
        assert (call is not None) == tried
        assert "<time>" not in strip_times(wrapped)
        for template in ("zoom_zero", "longvtg_r1", "videozoomer", "world"):
            if format_ok(wrapped, template) and template != "videozoomer":  # strict implies readable
                assert spans and parse_answer(wrapped) is not None


HUGE = 100_000
HOSTILE = [
    "<glue>" * (HUGE // 6),
    "<glue>" * (HUGE // 12) + "</glue>" * (HUGE // 12),
    "<glue></glue>" * (HUGE // 13),
    "<glue>" + "1" * HUGE + "</glue>",
    "<glue>" + "1:05:" * (HUGE // 5) + "</glue>",
    "<glue>" + "1." * (HUGE // 2) + "</glue>",
    "<glue>" + "(" * HUGE + "</glue>",
    "<glue>" + " " * HUGE + "x</glue>",
    "<glue>" + "(1, 2), " * (HUGE // 8) + "</glue>",
    "<glue>" + "(1, 2), " * (HUGE // 8) + "x</glue>",
    "<glue>" + "from " * (HUGE // 5) + "</glue>",
    "<answer>" + " " * HUGE + "x y</answer>",
    "<answer>" + "(" * HUGE + "</answer>",
    "<answer>A)" + "\n" * HUGE + "</answer>",
    "<time>" * (HUGE // 6),
    "<time>3</time>" * (HUGE // 14),
    " " * HUGE + "<time>3</time>",
    "<think>" * (HUGE // 7) + "</think>" * (HUGE // 8),
    "<video_zoom>" + "[" * HUGE + "</video_zoom>",
    "<video_zoom>" + "9" * HUGE + "</video_zoom>",
    "<think>x<time>1</time></think><answer>A</answer><glue>[" + "(1, 2), " * (HUGE // 8) + "(1, 2)]</glue>",
    "<think>x</think><answer>A</answer><timestamp>" + " " * HUGE + "1 to 2 to</timestamp>",
    "<" * HUGE,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hundred_thousand_characters_take_linear_time(text):
    """All parsers together stay below 0.1 s; a quadratic one would need minutes."""
    start = time.process_time()
    for template in ("zoom_zero", "longvtg_r1", "videozoomer"):
        format_ok(text, template)
    for parse in (parse_spans, parse_answer, parse_time_mentions, parse_tool_call, parse_think, strip_times):
        parse(text)
    parse_answer(text, bare=True)
    assert time.process_time() - start < 1.0


# --- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer> B\n</answer>", "B"),
        ("<answer>b</answer>", "B"),
        ("<answer>(B)</answer>", "B"),
        ("<answer>[B]</answer>", "B"),
        ("<answer> ( B )</answer>", "B"),
        ("<answer>B.</answer>", "B"),
        ("<answer>B) dots</answer>", "B"),
        ("<answer>(B) dots,\nas seen</answer>", "B"),
        ("<answer>B: dots</answer>", "B"),
        ("<answer>Z</answer>", "Z"),
        ("<answer>A dog</answer>", None),
        ("<answer>Bdots</answer>", None),
        ("<answer>AB</answer>", None),
        ("<answer></answer>", None),
        ("<answer>4</answer>", None),
        ("<answer>Ａ</answer>", None),
        ("<answer>B", None),
        ("B", None),
        ("<answer>A</answer><answer>B</answer>", "A"),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<think>a</think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>A</answer> or/think><answer>B</answer>", "A"),
        ("<think>never closed <answer>B</answer>", "B"),
        (WORLD, "B"),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer
    if "<answer>" in text:
        assert parse_answer(text, bare=True) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("(C).", "C"),
        ("B<|im_end|>", None),
        ("B. <answer>", None),
        ("B. answer>", "B"),
        ("The dog", None),
        ("", None),
        ("<think>A</think> d", "D"),
    ],
)
def test_bare_answers_are_read_only_when_asked_for(text, answer):
    assert parse_answer(text) is None
    assert parse_answer(text, bare=True) == answer


# --- time mentions


def test_time_mentions_of_figure_5():
    assert parse_time_mentions(FIGURE_5) == [(20.3, 49.7), (283.5, 304.2)]


def test_single_times_are_spans_of_length_zero_and_unreadable_ones_are_skipped():
    text = "a <time>12.5s</time> b <time>soon</time> c <time>3 to 4, 5 to 6</time> <time>1e999</time> <time>0:65</time>"
    assert parse_time_mentions(text + " <time>7") == [(12.5, 12.5), (3, 4), (5, 6)]


def test_strip_times_leaves_the_sentence():
    assert strip_times("a screen <time> (20.3, 49.7) </time>. Next <time>3</time> men") == "a screen. Next men"
    assert strip_times("no times  here ") == "no times  here "
    assert strip_times("cut <time>3.0, 8") == "cut"
    assert strip_times("X <time>3</time>\n<time>4</time>.") == "X\n."


def test_parse_think():
    assert parse_think(WORLD) == "red<time>(3.0,8.0)</time>"
    assert parse_think("<think>a</think><think>b</think>") == "a"
    assert parse_think("<think>a") is None


# --- tool calls


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (CALL, ToolCall((12.0, 20.5), 2.0)),
        ("<think>closer</think>" + CALL, ToolCall((12.0, 20.5), 2.0)),
        ('<video_zoom>\n{"fps": 0.5, "segment": [0, 4]}\n</video_zoom>', ToolCall((0.0, 4.0), 0.5)),
        (CALL + "</answer>", ToolCall((12.0, 20.5), 2.0)),
        ('<video_zoom>{"segment": [1, 9.5e8], "fps": 1e-8}</video_zoom>', ToolCall((1.0, 9.5e8), 1e-8)),
        ("<answer>B</answer>", None),
        ("<think>" + CALL + "</think><answer>B</answer>", None),
        (CALL + CALL, "exactly one call"),
        (CALL + "<video_zoom>", "exactly one call"),
        (CALL[:-13], "exactly one call"),
        ("</video_zoom>", "exactly one call"),
        (f"<think>a{CALL[:-13]}</think></video_zoom>", "exactly one call"),
        (CALL.replace("<video_zoom>", "<video_zoom><think></think>"), "after thinking"),
        (CALL + "<answer>B</answer>", "not both"),
        ("<video_zoom></video_zoom>", "not one JSON object"),
        ("<video_zoom>{} {}</video_zoom>", "not one JSON object"),
        ("<video_zoom>{'segment': [1, 2], 'fps': 2}</video_zoom>", "not one JSON object"),
        ("<video_zoom>[1, 2]</video_zoom>", "exactly the keys"),
        ('<video_zoom>{"segment": [1, 2]}</video_zoom>', "exactly the keys"),
        ('<video_zoom>{"segment": [1, 2], "fps": 2, "x": 1}</video_zoom>', "exactly the keys"),
        ('<video_zoom>{"segment": 1, "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, "2"], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, true], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, NaN], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, 1e999], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [-1e999, 1], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, 1e9], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [1, ' + "9" * 150 + '], "fps": 2}</video_zoom>', "pair of numbers"),
        ('<video_zoom>{"segment": [3, 2], "fps": 2}</video_zoom>', "0 <= start < end"),
        ('<video_zoom>{"segment": [2, 2], "fps": 2}</video_zoom>', "0 <= start < end"),
        ('<video_zoom>{"segment": [-1, 2], "fps": 2}</video_zoom>', "0 <= start < end"),
        ('<video_zoom>{"segment": [1, 2], "fps": 0}</video_zoom>', "above 0"),
        ('<video_zoom>{"segment": [1, 2], "fps": -2}</video_zoom>', "above 0"),
        ('<video_zoom>{"segment": [1, 2], "fps": "2"}</video_zoom>', "above 0"),
        ('<video_zoom>{"segment": [1, 2], "fps": false}</video_zoom>', "above 0"),
        ("<video_zoom>" + " " * 201 + "</video_zoom>", "longer than 200 characters"),
        ("<video_zoom>" + " " * 200 + "</video_zoom>", "not one JSON object"),
    ],
)
def test_parse_tool_call(text, call):
    result = parse_tool_call(text)
    if isinstance(call, str):
        assert isinstance(result, str) and call in result
        assert result[0].isupper() and result.endswith(".")  # a sentence that can be shown to the policy
    else:
        assert result == call
        assert call is None or all(type(x) is float for x in (*result.span, result.fps))


# --- the strict check

ACCEPTED = [
    ("world", WORLD),
    ("zoom_zero", WORLD),
    ("zoom_zero", FIGURE_5),
    ("zoom_zero", "<think>x <time>21.0</time></think>" + SECTION_4_2),
    ("zoom_zero", "<think>x <time>later</time> y <time>21.0</time></think>" + SECTION_4_2),  # one readable is enough
    ("zoom_zero", "<think>x <time>21.0</time></think>\n<answer> (M)\n</answer>\n<glue>\n[ ( 1 , 2 ) , (3,4) ] </glue>"),
    ("world", WORLD.replace("[(3.0,8.0)]", "[(3.0,8.0),(9,10)]")),
    ("world", WORLD.replace("red", "<answer glue> /glue> </glue red")),  # no tags
    ("longvtg_r1", LONGVTG),
    ("longvtg_r1", LONGVTG.replace("12.5 to 30.0", " 12.5  to  30.0\n")),
    ("videozoomer", "<think>closer</think>" + CALL),
    ("videozoomer", "<think>I see</think>\n<answer>B</answer>"),
]


@pytest.mark.parametrize(("template", "text"), ACCEPTED)
def test_templates_accept_their_own_format(template, text):
    assert format_ok(text, template) is True
    assert format_ok(f" \n{text}\n", template) is True


@pytest.mark.parametrize(("template", "text"), ACCEPTED)
def test_any_missing_repeated_or_extra_piece_is_refused(template, text):
    tags = [tag for tag in ("think", "answer", "glue", "timestamp", "video_zoom") if f"<{tag}>" in text]
    for tag in tags:
        start, end = tag_ranges(text, tag)[0]
        block, inner = text[start:end], text[start + len(tag) + 2 : end - len(tag) - 3]
        for changed in (
            text[:start] + text[end:],  # block missing
            text[:start] + block + block + text[end:],  # block twice
            text[:start] + f"<{tag}></{tag}>" + text[end:],  # block empty
            text[:start] + f"<{tag}> \n</{tag}>" + text[end:],
            text[:start] + f"<{tag}>{inner}" + text[end:],  # unclosed
            text[:start] + f"{inner}</{tag}>" + text[end:],  # unopened
            text[:start] + f"<{tag}>" + block + text[end:],  # nested
            text[:start] + "word" + text[start:],  # words between the blocks
            text[:end] + "word" + text[end:],
        ):
            assert format_ok(changed, template) is False, changed
    first, second = (text[slice(*tag_ranges(text, tag)[0])] for tag in tags[:2])
    assert not format_ok(text.replace(first, "@").replace(second, first).replace("@", second), template)  # order
    assert not format_ok("", template)


@pytest.mark.parametrize(
    "text",
    [
        SECTION_4_2,  # the example inside the prompt shows the last two blocks only
        WORLD.replace("<time>(3.0,8.0)</time>", ""),  # no time in think
        WORLD.replace("<time>(3.0,8.0)</time>", "<time>soon</time>"),
        WORLD.replace("</time>", ""),
        WORLD.replace("<answer>B<", "<answer>b<"),
        WORLD.replace("<answer>B<", "<answer>B.<"),
        WORLD.replace("<answer>B<", "<answer>(B<"),
        WORLD.replace("<answer>B<", "<answer>dots<"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(8.0,3.0)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[[3.0,8.0]]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "(3.0,8.0)</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.0,8.0)</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "(3.0,8.0)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[3.0,8.0]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.0 to 8.0)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.0s,8.0s)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.0,8.0),]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.0,)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(3.,8.)]</glue>"),
        WORLD.replace("[(3.0,8.0)]</glue>", "[(-3.0,8.0)]</glue>"),
        WORLD.replace("<think>red", "<think><glue>red"),
        WORLD.replace("<think>red", "<think></answer>red"),
        WORLD + "<|im_end|>",
    ],
)
def test_zoom_zero_refuses(text):
    assert format_ok(text, "zoom_zero") is False


@pytest.mark.parametrize(
    "span", ["30.0 to 12.5", "12.5-30.0", "12.5to30.0", "12.5s to 30.0s", "1 to 2, 3 to 4", "[(1, 2)]"]
)
def test_longvtg_refuses(span):
    assert not format_ok(LONGVTG.replace("12.5 to 30.0", span), "longvtg_r1")


def test_videozoomer_refuses_an_unreadable_call():
    assert not format_ok("<think>closer</think>" + CALL.replace("2}", "0}"), "videozoomer")


def test_samples_without_options_have_no_answer_block():
    event = LONGVTG.replace("<answer>C</answer>\n", "")
    assert format_ok(event, "longvtg_r1", has_options=False)
    assert not format_ok(event, "longvtg_r1")
    assert not format_ok(LONGVTG, "longvtg_r1", has_options=False)
    assert format_ok(WORLD.replace("<answer>B</answer>", ""), "zoom_zero", has_options=False)


@for_all(MESSY)
def test_strict_check_survives_insertions_only_of_white_space_between_blocks(text):
    inserted = WORLD.replace("</think><answer>", f"</think>{text}<answer>")
    assert format_ok(inserted, "world") == (not text.strip())
