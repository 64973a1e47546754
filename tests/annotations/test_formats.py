"""Each format's reader, on a few rows as published and on rows made up here."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from rowfiles import RECORD, write_json, write_rows

from annotations import records
from annotations.formats import FORMATS, looks_like
from annotations.packed import Packed
from annotations.rows import DataError, Report, Sample
from annotations.samples import read_samples, read_with_report, stream, trainable
from config import Config
from prompts import LETTERS

ROWS = json.loads(Path(__file__).with_name("published.json").read_text())


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder of published files, cut down to a few of their rows."""
    for name, text in ROWS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def read(path, format):
    samples, report = read_with_report(path, format)
    return {sample.id: sample for sample in samples}, report


# ---------------------------------------------------------------- published formats: rows as published


def test_nextgqa(published):
    samples, report = read(published / "nextgqa/test.csv", "nextgqa")
    assert list(samples) == ["3621121750_2", "7389955172_3", "4675888059_0", "3842638015_4"]
    one = samples["3621121750_2"]
    assert one.question == "why did the boy punch his hand forwards in the middle of the video"
    assert one.options[3:] == ("he is bored", "listening to music and dancing")
    assert (one.answer, one.kind, one.video) == ("E", "CW", "1027/3621121750.mp4")
    assert one.evidence == ((15.9, 20.2),) and one.duration == pytest.approx(1481 / 29.97, abs=1e-3)
    assert samples["3842638015_4"].options[3:] == ("happy", "happy")
    assert samples["3842638015_4"].answer == "D"  # the first of two equal options
    assert samples["7389955172_3"].kind == "TN"  # TP counts as TN
    assert samples["4675888059_0"].evidence == ((-0.1, 5.5),)  # as published
    assert report.dropped == [] and report.notes["spans that start below 0"] == 1


def test_nextgqa_ends_after_the_video_stay(published):
    samples, report = read(published / "nextgqa/val.csv", "nextgqa")
    assert [s.evidence for s in samples.values()] == [((34.2, 39.0),), ((33.6, 39.0),)]
    assert all(s.duration < 39 for s in samples.values()) and report.notes["spans that end after the video"] == 2
    assert report.out_of_reach == []


def test_rextime(published, tmp_path):
    samples, report = read(published / "rextime/rextime_val.jsonl", "rextime")
    assert samples["qvh_val241"].evidence == ((0, 28),)
    assert samples["qvh_val241"].video == "2I9-kvemtSU_510.0_660.0.mp4"
    assert (samples["qvh_val241"].answer, samples["qvh_val241"].options) == ("A", ())
    assert samples["anet_val867"].evidence == ((1, 1),)
    assert report.notes["spans of zero length"] == 1
    assert report.out_of_reach == [("anet_val867", "evidence of zero length", "[(1.0, 1.0)]")]
    row = {"qid": "qvh_val1", "vid": "v", "question": "Why?", "options": ["<option one>", "two", "three", "four"]}
    row |= {
        "answer": "From <s0> to <e0>, two.",
        "ans": "B",
        "span": [0, 28],
        "duration": 150,
        "category": "cause_effect",
    }
    hosted = read_samples(write_json(tmp_path / "hosted.json", [row]), "rextime")[0]
    assert (hosted.options, hosted.answer) == (("<option one>", "two", "three", "four"), "B")
    assert (hosted.evidence, hosted.kind) == (((0, 28),), "cause_effect")


def test_cgbench(published):
    samples, _ = read(published / "cgbench/cgbench_mini.json", "cgbench")
    rows = {str(row["qid"]): row for row in json.loads(ROWS["cgbench/cgbench_mini.json"])}
    assert set(samples) == set(rows)
    for id, sample in samples.items():
        assert sample.options[LETTERS.index(sample.answer)] == rows[id]["answer"].strip()
        assert abs(sample.duration - rows[id]["duration"]) < 1
    assert samples["23"].duration == pytest.approx(1788.7667, abs=1e-4)  # of video_meta_info.json; the row says 1789
    assert samples["487"].evidence[0] > samples["487"].evidence[1]  # unsorted, as published
    assert samples["4677"].evidence[0][1] > samples["4677"].evidence[1][0]  # overlapping, as published
    assert len(set(samples["9961"].options)) < len(samples["9961"].options)  # a repeated choice is kept


def test_qvhighlights(published):
    samples, report = read(published / "qvhighlights/highlight_val_release.jsonl", "qvhighlights")
    assert report.dropped == []
    assert samples["2579"].evidence == ((82, 150),)
    assert samples["2579"].video == "NUsG9BgSes0_210.0_360.0.mp4"
    unlabelled, _ = read(published / "qvhighlights/highlight_test_release.jsonl", "qvhighlights")
    assert [s.evidence for s in unlabelled.values()] == [()]


def test_charades_sta(published):
    samples, report = read(published / "charades_sta/charades_sta_test.txt", "charades_sta")
    sitting = Sample("E6DLK_1", "E6DLK.mp4", "a person sits in a chair.", (), None, ((3.1, 11.8),), 27.25)
    assert samples["E6DLK_1"] == sitting
    assert samples["FPJ9D_2"].evidence == ((25.8, 34.0),) and samples["FPJ9D_2"].duration == 33.42
    assert report.notes["spans that end after the video"] == 1
    as_json, _ = read(published / "charades_sta/temporal_grounding_charades.json", "charades_sta")
    assert as_json == samples


def test_activitynet(published):
    samples, report = read(published / "activitynet/train.json", "activitynet")
    second = samples["train:v_ehGHCYKzyZ8_1"]  # published with a space before it
    assert second.question == "A man and woman are in a living room demonstrating exercises."
    assert samples["train:v_mIi5fkvHDAo_0"].question == "The monkey driving the speed boat is shown again."  # "\\nThe"
    assert samples["train:v_0bosp4-pyTM_0"].evidence == ((60.71, 61.29),)  # published reversed
    assert report.notes == {
        "reversed spans swapped": 1,
        "spans of zero length": 1,
        "spans that end after the video": 1,
    }
    (published / "activitynet/val_1.json").write_text(ROWS["activitynet/train.json"])
    other, _ = read(published / "activitynet/val_1.json", "activitynet")
    assert not set(samples) & set(other)  # the file's name keeps two files about the same videos apart


def test_tacos_frames_become_seconds(published):
    samples, _ = read(published / "tacos/test.json", "tacos")
    one = samples["test:s30-d52.avi_0"]
    assert one.video == "s30-d52.avi"
    assert one.evidence == ((141 / 29.4, 354 / 29.4),)
    assert one.duration == 7346 / 29.4


def test_ego4d_nlq(tmp_path):
    queries = [
        {"clip_start_sec": 117.332, "clip_end_sec": 126.502, "query": "Where was the cup ?", "template": "Objects"},
        {"clip_start_sec": 0.0, "clip_end_sec": 0.0, "query": None, "template": None},
        {"query": ""},
        {"query": "In the test file?", "template": None},
    ]
    clip = {"clip_uid": "c", "clip_start_sec": 480, "clip_end_sec": 960.0}
    clip |= {"annotations": [{"annotation_uid": "a", "language_queries": queries}]}
    file = {"version": "1.0", "videos": [{"video_uid": "v", "clips": [clip]}]}
    samples, report = read(write_json(tmp_path / "nlq.json", file), "ego4d_nlq")
    assert [(d.row, d.reason) for d in report.dropped] == [(f"query c_a_{k}", "empty question") for k in (1, 2)]
    assert list(samples) == ["c_a_0", "c_a_3"]
    one = samples["c_a_0"]
    assert (one.video, one.evidence, one.duration, one.kind) == ("c.mp4", ((117.332, 126.502),), 480, "Objects")
    assert samples["c_a_3"].evidence == ()
    assert {sample.meta["wording"] for sample in samples.values()} == {"question"}
    line = {"qid": "q_0", "query": "where did I put the knife", "duration": 480.0, "vid": "v"}
    line |= {"relevant_windows": [[12.5, 20.033]]}
    other = read_samples(write_rows(tmp_path / "nlq.jsonl", [line]), "ego4d_nlq")[0]
    assert (other.evidence, other.meta) == (((12.5, 20.033),), {"wording": "question"})


def test_videomme(tmp_path):
    row = {"videoID": "BBBBBBBBBBB", "duration": "long", "question_id": "902-3", "task_type": "Ordering"}
    row |= {"question": "In which order?", "options": ["A. (b)(a).", "B. (a)(b).", "C. A cat.", "D. B is the answer."]}
    sample = read_samples(write_json(tmp_path / "v.json", [{**row, "answer": "D"}]), "videomme")[0]
    assert sample.options == ("(b)(a).", "(a)(b).", "A cat.", "B is the answer.")
    assert (sample.answer, sample.video, sample.duration) == ("D", "BBBBBBBBBBB.mp4", None)
    assert (sample.kind, sample.meta) == ("Ordering", {"length": "long"})


def test_mlvu_folder(published):
    samples, report = read(published / "mlvu", "mlvu")
    wrong = "the answer is not among the options"
    assert [(d.row, d.reason) for d in report.dropped] == [
        ("2_needle.json, row 2", wrong),
        ("7_topic_reasoning:2", "empty question"),
    ]
    assert samples["1_plotQA:1"].video == "1_plotQA/movie101_6.mp4"
    assert samples["1_plotQA:1"].answer == "A"
    assert samples["8_sub_scene:1"].options == ()
    assert samples["8_sub_scene:1"].answer is None
    assert samples["8_sub_scene:1"].meta["reference"].startswith("The man with long braids")
    one_task, _ = read(published / "mlvu/1_plotQA.json", "mlvu")
    assert list(one_task) == ["1_plotQA:1"]


def test_lvbench(published, tmp_path):
    samples, report = read(published / "lvbench/lvbench_clean.json", "lvbench")
    one = samples["lvbench_clean:1"]
    assert one.options == ("The little lion", "The bat-eared fox", "The ostrich", "The deer")
    assert (one.answer, one.evidence, one.kind) == ("D", ((52, 52),), "entity recognition")
    assert [s.video for s in samples.values() if not s.evidence] == ["00000044.mp4"]  # "08:17-None"
    assert report.notes["reversed spans swapped"] == 1  # "50:54-50:15"
    assert "event understanding + temporal grounding" in {s.kind for s in samples.values()}
    qa = {"uid": "9002", "question": "Who enters?\n(A) A boy\n(B) A girl\n(C) A dog\n(D) Nobody", "answer": "A"}
    qa |= {"question_type": ["entity recognition", "reasoning"], "time_reference": "102:07-102:40"}
    line = {"key": "AAAAAAAAAA", "type": "cartoon", "qa": [qa]}
    original = read_samples(write_rows(tmp_path / "meta.jsonl", [line]), "lvbench")[0]
    assert (original.id, original.question, original.video) == ("9002", "Who enters?", "AAAAAAAAAA.mp4")
    assert original.options == ("A boy", "A girl", "A dog", "Nobody") and original.answer == "A"
    assert original.evidence == ((6127, 6160),)
    assert original.kind == "entity recognition + reasoning"


def test_longvideobench(published):
    samples, _ = read(published / "longvideobench/lvb_val.json", "longvideobench")
    assert {len(s.options) for s in samples.values()} == {3, 4, 5}
    one = samples["7F9IrtSHmc0_0"]
    assert (one.answer, one.options[2], one.video, one.duration) == ("C", "speaking", "7F9IrtSHmc0.mp4", 422.66)
    assert (one.kind, one.meta, one.evidence) == ("O2E", {"length": "600"}, ())


def test_plm_video(tmp_path):
    moment = {"uid": 11, "video": "sav_000001.mp4", "total_frames": 85, "caption": "A person lifts a box."}
    moment |= {"start_frame": 12, "end_frame": 40}
    sample = read_samples(write_rows(tmp_path / "rtloc.jsonl", [moment]), "plm_video")[0]
    assert (sample.evidence, sample.duration) == (((0.5, 40 / 24),), 85 / 24)
    row = {"qa_uid": "fg_0", "video": "clip_0.mp4", "question": "Which hand?", "answer": "left hand"}
    row |= {"metadata": {"question_type": "hand"}}
    one = {**row, "uid": "fg_0_0", "options": {"option_0": "left hand", "option_1": "right hand"}}
    two = {**row, "uid": "fg_0_1", "options": {"option_0": "both hands", "option_1": "left hand"}}
    choices = read_samples(write_rows(tmp_path / "fgqa.jsonl", [one, two]), "plm_video")
    assert [(s.answer, s.options) for s in choices] == [
        ("A", ("left hand", "right hand")),
        ("B", ("both hands", "left hand")),
    ]
    assert {s.meta["group"] for s in choices} == {"fg_0"} and choices[0].kind == "hand"


def test_time_r1(published):
    samples, report = read(published / "time_r1/train_2k5.json", "time_r1")
    whole, part, typo = samples.values()
    assert whole.id.startswith("my|cosmo|QtWT8rxUuNk|") and whole.question.startswith("A purple hanger")
    assert whole.video == "./dataset/timer1/videos/timerft_data/QtWT8rxUuNk.mp4"
    assert (whole.evidence, whole.duration) == (((1.0, 4.0),), 93.2932)
    assert (part.evidence, part.duration) == (((39.0 + 34.9, 39.0 + 41.9),), None)  # 34.9 to 41.9 s of a part from 39 s
    assert typo.evidence == ((120.0, 14220.0),) and report.notes["spans that end after the video"] == 1
    bench, _ = read(published / "time_r1/tvgbench.json", "time_r1")
    sitting, gas = bench.values()
    assert (sitting.question, sitting.evidence, sitting.duration, sitting.kind) == (
        "a person was sitting at a table.",
        ((13.4, 28.1),),
        30.12,
        "Human Pose",
    )
    assert gas.evidence == (pytest.approx((9.944375536211354 + 53.05562446378865, 99.0)),) and gas.duration is None


def test_timelens(tmp_path):
    bench = {"OHOFG": {"duration": 35.04, "spans": [[2.3, 6.8], [9, 12.5]], "queries": ["person sits ", "a  dog"]}}
    samples, _ = read(write_json(tmp_path / "charades-timelens.json", bench), "timelens")
    assert list(samples.values()) == [
        Sample("charades-timelens:OHOFG_0", "OHOFG.mp4", "person sits", (), None, ((2.3, 6.8),), 35.04),
        Sample("charades-timelens:OHOFG_1", "OHOFG.mp4", "a dog", (), None, ((9, 12.5),), 35.04),
    ]
    line = {"source": "cosmo_cap", "video_path": "cosmo_cap/BV.mp4", "duration": 60}
    line |= {"events": [{"query": "a cut", "span": [[1, 2], [5, 6]]}, {"query": "a jump", "span": [3, 4]}]}
    found = read_samples(write_rows(tmp_path / "timelens-100k.jsonl", [line]), "timelens")
    assert [(s.video, s.evidence, s.kind) for s in found] == [
        ("cosmo_cap/BV.mp4", ((1, 2), (5, 6)), "cosmo_cap"),
        ("cosmo_cap/BV.mp4", ((3, 4),), "cosmo_cap"),
    ]
    bench["OHOFG"]["queries"].pop()
    with pytest.raises(DataError, match="video OHOFG, field 'spans': 2 for 1 queries"):
        read_samples(write_json(tmp_path / "x.json", bench), "timelens")


def test_video_r1(tmp_path):
    row = {"problem_id": 2, "problem": "What appears on the screen?", "data_type": "video", "process": ""}
    row |= {"problem_type": "multiple choice", "options": ["A. A notification", "B. A command"]}
    row |= {"solution": "<answer>A</answer>", "path": "./LLaVA-Video-178K/a.mp4", "data_source": "LLaVA-Video-178K"}
    image = {**row, "data_type": "image", "path": "./Geometry/0.jpg"}
    count = {**row, "problem_type": "numerical", "options": [], "solution": "<answer>3</answer>"}
    samples, report = read(write_json(tmp_path / "Video-R1-260k.json", [row, image, count]), "video_r1")
    choice, number = samples.values()
    assert (choice.options, choice.answer, choice.video) == (
        ("A notification", "A command"),
        "A",
        "./LLaVA-Video-178K/a.mp4",
    )
    assert (number.id, number.answer, number.meta) == ("Video-R1-260k:3", None, {"reference": "3"})
    assert report.left_out == {"not about a video": 1} and report.dropped == []


def test_videochat_r1(tmp_path):
    rows = [
        {"video": "a.mp4", "question": "Who?", "options": ["(A) x", "(B) y"], "answer": "(B)", "glue": "[(1.5, 2)]"},
        {"video": "b", "question": "he waves", "glue": [[3, 4]], "duration": 12.5},
    ]
    samples = read_samples(write_json(tmp_path / "gqa.json", rows), "videochat_r1")
    assert (samples[0].answer, samples[0].evidence, samples[0].duration) == ("B", ((1.5, 2),), None)
    assert samples[1] == Sample("gqa:2", "b.mp4", "he waves", (), None, ((3, 4),), 12.5)


def test_easy_r1(tmp_path):
    rows = [
        {"problem": "<video>Which?\nA. red\nB. blue\nAnswer with a letter.", "answer": "B", "videos": ["a.mp4"]},
        {"problem": "<video> Find it: (A) or not", "answer": "<answer>13.40 to 28.10</answer>", "videos": ["a.mp4"]},
        {"problem": "How many?", "answer": "2 to 3 people", "videos": [{"video": "c.mp4"}], "problem_type": "open"},
        {"problem": "<image>Which?", "answer": "4", "images": ["a.jpg"]},
        {"problem": "Which?", "options": ["A. x", "B. y"], "answer": "\\boxed{A}", "videos": ["a.mp4"], "images": []},
    ]
    samples, report = read(write_json(tmp_path / "e.json", rows), "easy_r1")
    colour, moment, people, boxed = samples.values()
    assert (colour.question, colour.options, colour.answer) == (
        "Which?\nAnswer with a letter.",
        ("red", "blue"),
        "B",
    )
    assert (moment.question, moment.evidence, moment.options) == ("Find it: (A) or not", ((13.4, 28.1),), ())
    assert (people.video, people.evidence, people.meta) == ("c.mp4", (), {"reference": "2 to 3 people"})
    assert (boxed.answer, boxed.options) == ("A", ("x", "y"))
    assert report.left_out == {"not about a video": 1}
    with pytest.raises(DataError, match="row 1, field 'videos': expected one video, got 2"):
        read_samples(write_json(tmp_path / "x.json", [{**rows[0], "videos": ["a.mp4", "b.mp4"]}]), "easy_r1")


# ---------------------------------------------------------------- our own records, quickly

USUAL = {"id": "1", "video": "a.mp4", "question": "Q?", "options": ["(A) x ", "(B)y"], "answer": "(B)"}
USUAL |= {"glue": [[3, 8.5], [9, 9]], "duration": 16}
CHANGES = [
    {},
    {"kind": "fine"},
    {"glue": []},
    {"duration": None},
    {"duration": 16.5, "extra": [1]},
    *({"id": value} for value in (7, "<|im_end|>", "\ud800", None)),
    *({"video": value} for value in (3, "", "v")),
    *({"question": value} for value in (None, "a <|x|>", " ")),
    *(
        {"options": value}
        for value in ([], ["x", "y"], ["(B) x", "(A) y"], [" (A) x", "B. y"], ["(A) x", 3], "AB", None)
    ),
    *({"answer": value} for value in ("B", "(C)", "y", None, 1, "", "(B) y")),
    *({"glue": v} for v in ("[[1, 2]]", [[8, 3]], [[1, True]], [[1, 2, 3]], [[1, float("inf")]], [[1, "2"]], 3, None)),
    *(
        {"glue": v}
        for v in ([[1, 10**400]], [[-1.7e308, 1.7e308]], [[True, 3]], [[-1, 3]], [[3, 17]], [[9, 9]], "", {})
    ),
    {"glue": [[2**53, 2**53 + 1]], "duration": None},
    *({"options": ["(A) x", f"(B) {text}"]} for text in ("<|x|>", "\ud800")),
    {"options": [f"({letter}) x" for letter in LETTERS] + ["(A) x"]},
    *({"duration": value} for value in (0, -1, True, float("nan"), float("inf"), "16", 10**400)),
    *({"kind": value} for value in (3, None, "<|x|>", "")),
    *({"meta": value} for value in ({}, {"clues": ["a"]}, 3)),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_usual_records_are_read_quickly_as_they_are_read_carefully(tmp_path, monkeypatch, changes):
    path = write_rows(tmp_path / "x.jsonl", [{**USUAL, **changes}])
    assert records.usual_record(USUAL) is not None

    def outcome():
        try:
            return read_samples(path)
        except DataError as error:
            return str(error)

    quick = outcome()
    monkeypatch.setattr(records, "usual_record", lambda fields: None)
    assert outcome() == quick


def mutated(random, changes):
    """A few rows, most of them usual, one with these changes, some with others."""
    rows = []
    for k in range(random.randint(1, 4)):
        row = USUAL | {"id": f"q{k if random.random() < 0.95 else 0}", "video": random.choice(["a.mp4"] * 5 + ["b"])}
        row |= {"glue": [[3, 8.5]]} | random.choice([{}] * 5 + [{"kind": "fine"}] + [random.choice(CHANGES)])
        rows.append(dict(random.sample(sorted(row.items()), len(row))))
    random.choice(rows).update(changes)
    if random.random() < 0.1:
        rows[-1].pop(random.choice(sorted(USUAL)), None)
    return rows


@pytest.mark.parametrize("template", ["zoom_zero", "longvtg_r1"])
def test_training_keeps_of_usual_and_changed_rows_what_is_read_of_them_carefully(tmp_path, monkeypatch, template):
    (tmp_path / "a.mp4").touch()
    config = Config(template=template, grounding="iou")
    random = Random(0)
    outcomes = Counter()

    def outcome(path, as_read):
        report = Report(path, "records")
        try:
            rows = list(trainable(stream(report, tmp_path, as_read), config, "x"))
        except DataError as error:
            return str(error), report
        outcomes["passed on as read"] += sum(isinstance(row, tuple) for row in rows)
        return list(map(repr, Packed(rows))), report  # repr: 3 is not 3.0

    for changes in 3 * CHANGES:
        path = write_rows(tmp_path / "x.jsonl", mutated(random, changes))
        quick = outcome(path, as_read=True)
        with monkeypatch.context() as careful:
            careful.setattr(records, "usual_record", lambda fields: None)
            assert outcome(path, as_read=False) == quick
        outcomes["refused" if isinstance(quick[0], str) else "loaded"] += 1
    assert min(outcomes[name] for name in ("passed on as read", "refused", "loaded")) > 30, outcomes


def test_optional_fields_that_are_null_are_absent(published, tmp_path):
    """As parquet has them, where every row has all columns."""
    usual, nulls = tmp_path / "a" / "x.json", tmp_path / "b" / "x.json"
    for path in (usual, nulls):
        path.parent.mkdir()
    rows = json.loads(ROWS["longvideobench/lvb_val.json"])
    for row in rows:
        row.pop("correct_choice")
    for format, some, optional in [
        ("records", [{**USUAL, "options": ["x", "y"]}], ("meta", "kind")),
        ("qvhighlights", [json.loads(ROWS["qvhighlights/highlight_test_release.jsonl"])], ("relevant_windows",)),
        ("longvideobench", rows, ("correct_choice",)),
        ("mlvu", json.loads(ROWS["mlvu/8_sub_scene.json"]), ("candidates", "question_id")),
        ("time_r1", json.loads(ROWS["time_r1/train_2k5.json"]), ("question", "answer", "start")),
    ]:
        write_json(usual, some)
        write_json(nulls, [{**dict.fromkeys(optional), **row} for row in some])
        assert read_samples(nulls, format) == read_samples(usual, format) != []


# ---------------------------------------------------------------- which format a file has


BESIDE = ("gsub_test.json", "gsub_val.json", "map_vid_vidorID.json", "video_meta_info.json", "Charades_v1_test.csv")


@pytest.mark.parametrize("name", sorted(name for name in ROWS if not name.endswith(BESIDE)))
def test_a_published_file_looks_like_its_own_format(published, name):
    assert looks_like(published / name) == name.partition("/")[0]


def test_a_video_and_a_question_are_enough_to_ask(tmp_path):
    asked = {"video": "a.mp4", "question": "When does the dog jump?"}
    [sample] = read_samples(write_rows(tmp_path / "asked.jsonl", [asked]))
    assert (sample.video, sample.question) == ("a.mp4", "When does the dog jump?")
    assert (sample.options, sample.answer, sample.evidence, sample.duration) == ((), None, (), None)
    [sample] = read_samples(write_rows(tmp_path / "chosen.jsonl", [asked | {"options": ["at once", "later"]}]))
    assert sample.options == ("at once", "later") and sample.answer is None
    for name in asked:
        rest = {key: value for key, value in asked.items() if key != name}
        with pytest.raises(DataError, match=f"'{name}': is missing"):
            read_samples(write_rows(tmp_path / f"no-{name}.jsonl", [rest]))


def test_a_misspelled_field_is_not_an_absent_one(tmp_path):
    row = {"video": "a.mp4", "question": "When?", "option": ["at once", "later"]}
    with pytest.raises(DataError, match=r"'options': is missing; there are .*option"):
        read_samples(write_rows(tmp_path / "misspelled.jsonl", [row]))
    row = {"video": "a.mp4", "qestion": "When?"}
    with pytest.raises(DataError, match="'question': is missing; there are qestion, video"):
        read_samples(write_rows(tmp_path / "question.jsonl", [row]))


def test_a_file_of_another_format_says_which(published, tmp_path):
    path = published / "rextime/rextime_val.jsonl"
    with pytest.raises(
        DataError, match=r"row 1, field 'video': is missing.*like rextime: choose --data_format rextime"
    ):
        read_samples(path)
    with pytest.raises(DataError, match="looks like nextgqa: choose --data_format nextgqa"):
        read_samples(published / "nextgqa/val.csv", "cgbench")
    with pytest.raises(DataError, match="looks like activitynet"):
        read_samples(published / "activitynet/train.json")
    with pytest.raises(DataError, match="looks like charades_sta"):
        read_samples(published / "charades_sta/charades_sta_test.txt")
    with pytest.raises(DataError, match="looks like records: choose --data_format records"):
        read_samples(write_rows(tmp_path / "own.jsonl", [RECORD]), "lvbench")
    talk = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    with pytest.raises(DataError, match=r"looks like dialogues, for sft\.py"):
        read_samples(write_rows(tmp_path / "talk.jsonl", [talk]))


def test_no_hint_where_the_format_is_right(tmp_path):
    with pytest.raises(DataError, match="field 'glue'") as error:
        read_samples(write_rows(tmp_path / "x.jsonl", [{**RECORD, "glue": 3}]))
    assert "looks like" not in str(error.value)
    assert all(format.fields for format in FORMATS.values())


# ---------------------------------------------------------------- published formats: made-up rows


def nextgqa_folder(folder, rows, videos):
    header = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
    (folder / "val.csv").write_text("\n".join([header, *rows]) + "\n")
    write_json(folder / "gsub_val.json", videos)
    return folder / "val.csv"


def test_nextgqa_small(tmp_path):
    videos = {
        "9": {"duration": 10, "fps": 25.0, "location": {"1": [[1.2, 5], [7, 8.5]]}},
        "8": {"duration": 1, "fps": 1},
    }
    rows = [
        "9,260,320,240,what,b,1,TP,a,b,c,b,e",
        "9,260,320,240,why,x,2,CW,a,b,c,d,e",
        "7,260,320,240,why,a,2,CW,a,b,c,d,e",
    ]
    samples, report = read_with_report(nextgqa_folder(tmp_path, rows, videos), "nextgqa")
    assert samples[0] == Sample("9_1", "9.mp4", "what", tuple("abcbe"), "B", ((1.2, 5), (7, 8.5)), 10.4, "TN")
    assert (samples[1].evidence, samples[1].duration) == ((), None)
    assert report.dropped == [("row 2", "the answer is not among the options", "x")]
    assert report.notes["questions without evidence"] == 1
    assert report.remarks == ["no map_vid_vidorID.json beside it: videos are named without their folder"]


@pytest.mark.parametrize(
    "row, message",
    [
        ("9,260,320,240,what,b,1,TP,a,b,c,b", "row 1: expected 13 cells"),
        ("9,260,320,240,what, now,b,1,TP,a,b,c,b,e", "row 1: expected 13 cells"),
        ("9,many,320,240,what,b,1,TP,a,b,c,b,e", "row 1, field 'frame_count': expected a positive number, got 'many'"),
    ],
)
def test_nextgqa_bad_cells(tmp_path, row, message):
    videos = {"9": {"duration": 10, "fps": 25.0, "location": {"1": [[1.2, 5]]}}}
    with pytest.raises(DataError, match=rf"val\.csv: {message}"):
        read_samples(nextgqa_folder(tmp_path, [row], videos), "nextgqa")


def test_nextgqa_bad_spans_name_the_file_with_the_spans(tmp_path):
    path = nextgqa_folder(tmp_path, ["9,260,1,1,what,b,1,TP,a,b,c,b,e"], {"9": {"location": {"1": [[1]]}, "fps": 25}})
    with pytest.raises(DataError, match=r"gsub_val\.json: video 9, location, field '1': expected \[start, end\]"):
        read_samples(path, "nextgqa")


def test_charades_small(tmp_path):
    path = tmp_path / "charades_sta_test.txt"
    path.write_text("AB1 1.5 7##a ## in the text\nCD2 0.0 3.0##second\n")
    samples, report = read_with_report(path, "charades_sta")
    assert [(s.id, s.question, s.evidence, s.duration) for s in samples] == [
        ("AB1_0", "a ## in the text", ((1.5, 7),), None),
        ("CD2_1", "second", ((0, 3),), None),
    ]
    assert len(report.remarks) == 1
    write_json(tmp_path / "charades.json", {"AB1": {"duration": 30.5}})
    assert [s.duration for s in read_samples(path, "charades_sta")] == [30.5, None]
    path.write_text("AB1 1.5##no end\n")
    with pytest.raises(DataError, match="row 1: expected 'ID start end##sentence'"):
        read_samples(path, "charades_sta")


def test_captions_small(tmp_path):
    entry = {"duration": 9.5, "timestamps": [[0, 4], [7.5, 3]], "sentences": [" A dog\n barks. ", "It  runs."]}
    samples = read_samples(write_json(tmp_path / "val_1.json", {"v_1": entry}), "activitynet")
    assert [(s.id, s.question, s.evidence) for s in samples] == [
        ("val_1:v_1_0", "A dog barks.", ((0, 4),)),
        ("val_1:v_1_1", "It runs.", ((3, 7.5),)),
    ]
    with pytest.raises(DataError, match="video v_1, field 'timestamps': 2 for 1 sentences"):
        read_samples(write_json(tmp_path / "x.json", {"v_1": {**entry, "sentences": ["one"]}}), "activitynet")
    frames = {"timestamps": [[49, 98]], "sentences": ["Cut."], "fps": 24.5, "num_frames": 245}
    sample = read_samples(write_json(tmp_path / "t.json", {"s1.avi": frames}), "tacos")[0]
    assert (sample.video, sample.evidence, sample.duration) == ("s1.avi", ((2, 4),), 10)


def test_companion_and_table_files_that_hold_nothing(tmp_path):
    path = nextgqa_folder(tmp_path, [], {"9": {}})
    with pytest.raises(DataError, match=r"val\.csv: no rows"):
        read_samples(path, "nextgqa")
    with pytest.raises(DataError, match="expected a JSON object with entries, got list"):
        read_samples(write_json(tmp_path / "a.json", [1]), "activitynet")


def test_answers_that_are_no_option_are_dropped(tmp_path):
    row = {"video": "7", "question": "?", "candidates": ["(A) x", "(B) y"], "answer": "z", "question_type": ["a"]}
    row |= {"time_reference": "00:01-00:02"}
    good = {**row, "answer": "(A) x"}
    _, report = read_with_report(write_json(tmp_path / "lv.json", [row, good]), "lvbench")
    assert report.dropped == [("row 1", "the answer is not among the options", "z")]
    row = {"uid": "1", "qa_uid": "q", "video": "v", "question": "?", "options": {"option_0": "x", "option_1": "y"}}
    rows = [{**row, "answer": "z"}, {**row, "answer": "y"}]
    samples, report = read_with_report(write_rows(tmp_path / "fgqa.jsonl", rows), "plm_video")
    assert report.dropped == [("row 1", "the answer is not among the options", "z")]
    assert (samples[0].answer, samples[0].kind) == ("B", "")


def test_letter_fields_must_name_an_option(tmp_path):
    row = {"qid": 1, "video_uid": "v", "question": "?", "choices": ["a", "b"], "right_answer": "C", "duration": 9}
    row |= {"clue_intervals": [[1, 2]], "sub_category": "x"}
    with pytest.raises(
        DataError, match="row 1, field 'right_answer': expected the letter of one of 2 options, got 'C'"
    ):
        read_samples(write_json(tmp_path / "cg.json", [row]), "cgbench")
    assert read_samples(write_json(tmp_path / "cg.json", [{**row, "right_answer": "B"}]), "cgbench")[0].answer == "B"


def test_lvbench_small(tmp_path):
    row = {
        "video": "7",
        "question": "?",
        "candidates": ["(A) x", "(B) y"],
        "answer": "(B) y",
        "question_type": ["a", "b"],
    }
    references = ["102:07-102:40", "1:00:00-1:00:05", "08:17-None", "02:00-01:00", None]
    rows = [{**row, "time_reference": reference} for reference in references]
    samples, report = read_with_report(write_json(tmp_path / "lv.json", rows), "lvbench")
    assert [s.evidence for s in samples] == [((6127, 6160),), ((3600, 3605),), (), ((60, 120),), ()]
    assert {s.answer for s in samples} == {"B"}
    assert {s.kind for s in samples} == {"a + b"}
    assert report.notes["questions without evidence"] == 2


def test_longvideobench_with_numbered_options(tmp_path):
    row = {"id": "x_0", "video_path": "x.mp4", "question": "?", "duration": 9.5, "duration_group": 15}
    row |= {
        "question_category": "S2E",
        "option0": "a",
        "option1": "b",
        "option2": "c",
        "option3": "N/A",
        "option4": "N/A",
    }
    sample = read_samples(write_json(tmp_path / "l.json", [row]), "longvideobench")[0]
    assert (sample.options, sample.answer) == (("a", "b", "c"), None)
    with pytest.raises(DataError, match="field 'correct_choice': expected 0 to 2, got 3"):
        read_samples(write_json(tmp_path / "l.json", [{**row, "correct_choice": 3}]), "longvideobench")


def test_mlvu_small(tmp_path):
    row = {"video": "v.mp4", "duration": 9, "question": "?", "candidates": ["1", "2"], "question_type": "count"}
    task = write_json(
        tmp_path / "4_count.json", [{**row, "answer": "2"}, {**row, "answer": "3"}, {**row, "question_id": "C_0"}]
    )
    samples, report = read_with_report(task, "mlvu")
    assert [(s.id, s.answer, s.video) for s in samples] == [
        ("4_count:1", "B", "4_count/v.mp4"),
        ("C_0", None, "4_count/v.mp4"),
    ]
    assert report.dropped == [("4_count.json, row 2", "the answer is not among the options", "3")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.json files in this folder"):
        read_samples(tmp_path / "empty", "mlvu")


def test_the_page_about_data_lists_every_format():
    page = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")] == list(FORMATS)


# ---------------------------------------------------------------- numbers and names that nobody publishes

LONG = int("9" * 4000)  # more than a float holds
QUESTION = {"uid": "1", "video": "v", "question": "?", "options": {"option_0": "x", "option_1": "y"}, "answer": "x"}
CLIP = {"clip_uid": "c", "clip_start_sec": 5, "clip_end_sec": 9}
ASKED = {"annotation_uid": "a", "language_queries": [{"query": "Where?", "clip_start_sec": 1, "clip_end_sec": 2}]}
TOLD = {"video": "7", "question": "?", "candidates": ["(A) x", "(B) y"], "answer": "(B) y", "question_type": ["a"]}


def ego4d(**clip) -> dict:
    return {"version": 1, "videos": [{"clips": [{**CLIP, **clip, "annotations": [ASKED]}]}]}


@pytest.mark.parametrize(
    ("format", "content", "problem"),
    [
        ("lvbench", [{**TOLD, "time_reference": f"{'9' * 5000}:00-{'9' * 5000}:01"}], "'time_reference': expected"),
        ("plm_video", [{"uid": 1, "video": "v", "caption": "c", "start_frame": LONG, "end_frame": LONG}], "'start_fra"),
        ("plm_video", [{**QUESTION, "qa_uid": "q", "metadata": {"question_type": ["x"]}}], "'question_type': expected"),
        ("tacos", {"v": {"fps": 1e-308, "num_frames": 9, "timestamps": [[1, 2]], "sentences": ["s"]}}, "'duration'"),
        ("ego4d_nlq", ego4d(clip_end_sec=5), "question 'c_a_0', field 'duration': expected a positive number, got 0"),
        ("ego4d_nlq", ego4d(clip_end_sec=LONG), "question 'c_a_0', field 'duration': expected a positive number"),
        ("time_r1", [{"video": "v", "sentence": "s", "timestamp": [1, 1.7e308], "video_start": 1e308}], "'evidence'"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(tmp_path, format, content, problem):
    path = write_json(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=problem) as error:
        read_samples(path, format)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("folder", [5, ["a"], "a\ud800"])
def test_a_folder_of_videos_that_is_no_name_is_one_line(tmp_path, folder):
    path = nextgqa_folder(tmp_path, ["9,260,1,1,what,b,1,TP,a,b,c,b,e"], {"8": {}})
    write_json(tmp_path / "map_vid_vidorID.json", {"9": folder})
    with pytest.raises(DataError, match=r"map_vid_vidorID\.json: top level, field '9': "):
        read_samples(path, "nextgqa")
