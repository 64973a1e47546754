"""Each format's reader, on real rows where there are any, and on small rows made up here."""

import json
from pathlib import Path

import pytest
from rowfiles import write_json, write_rows

from annotations.rows import DataError, Sample
from annotations.samples import read_samples, read_with_report
from prompts import LETTERS

REAL = Path(__file__).resolve().parents[3] / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real annotation files are not at {REAL}")


def real_samples(name, format, **options):
    samples, report = read_with_report(REAL / name, format, **options)
    return {sample.id: sample for sample in samples}, report


# ---------------------------------------------------------------- published formats: real rows


@real
def test_nextgqa():
    samples, report = real_samples("nextgqa/test.csv", "nextgqa")
    assert (len(samples), report.dropped) == (357, [])
    one = samples["3621121750_2"]
    assert one.question == "why did the boy punch his hand forwards in the middle of the video"
    assert one.options[3:] == ("he is bored", "listening to music and dancing")
    assert (one.answer, one.kind) == ("E", "CW")
    assert samples["3842638015_4"].options[3:] == ("happy", "happy")
    assert samples["3842638015_4"].answer == "D"  # the first of two equal options
    assert {s.kind for s in samples.values()} == {"CW", "CH", "TN", "TC"}  # TP counts as TN
    assert sum(min(s.evidence)[0] < 0 for s in samples.values()) == report.notes["spans that start below 0"] == 7
    assert not any(id.startswith("2906873825_") for id in samples)  # its location is empty
    entry = json.loads((REAL / "nextgqa/gsub_test.json").read_text())
    folders = json.loads((REAL / "nextgqa/map_vid_vidorID.json").read_text())
    for id, sample in samples.items():
        video, qid = id.split("_")
        assert sample.evidence == tuple(tuple(map(float, span)) for span in entry[video]["location"][qid])
        assert abs(sample.duration - entry[video]["duration"]) <= 0.5
        assert sample.video == f"{folders[video]}.mp4"
    clipped, _ = real_samples("nextgqa/test.csv", "nextgqa", clip_spans=True)
    assert all(0 <= start <= end <= s.duration for s in clipped.values() for start, end in s.evidence)


@real
def test_nextgqa_ends_after_the_video_stay_and_empty_locations_have_no_question():
    samples, report = real_samples("nextgqa/val.csv", "nextgqa")
    entry = json.loads((REAL / "nextgqa/gsub_val.json").read_text())
    late = [s for s in samples.values() if any(end > s.duration for _, end in s.evidence)]
    assert (
        sum(end > s.duration for s in late for _, end in s.evidence)
        == report.notes["spans that end after the video"]
        == 21
    )
    for sample in late:
        video, qid = sample.id.split("_")
        assert [list(span) for span in sample.evidence] == entry[video]["location"][qid]
    assert entry["2830899473"]["location"] == {} and not any(id.startswith("2830899473_") for id in samples)


@real
def test_rextime():
    samples, report = real_samples("rextime/rextime_val.jsonl", "rextime")
    assert len(samples) == 458
    assert samples["qvh_val241"].evidence == ((0, 28),)
    assert samples["qvh_val241"].video == "2I9-kvemtSU_510.0_660.0.mp4"
    assert (samples["qvh_val241"].answer, samples["qvh_val241"].options) == ("A", ())
    assert samples["anet_val867"].evidence == ((1, 1),)
    assert report.notes["spans of zero length"] == 1
    assert report.notes["spans that end after the video"] == 2
    hosted, _ = real_samples("format_examples/rextime_hf_style.json", "rextime")
    assert hosted["qvh_val1"].options == ("<option one>", "two", "three", "four")
    assert (hosted["qvh_val1"].answer, hosted["qvh_val1"].evidence, hosted["qvh_val1"].kind) == (
        "B",
        ((0, 28),),
        "cause_effect",
    )


@real
def test_cgbench():
    samples, _ = real_samples("cgbench/cgbench_mini.json", "cgbench")
    rows = {str(row["qid"]): row for row in json.loads((REAL / "cgbench/cgbench_mini.json").read_text())}
    assert set(samples) == set(rows)
    assert {len(s.options) for s in samples.values()} == {5, 6, 7, 8}
    for id, sample in samples.items():
        assert sample.options[LETTERS.index(sample.answer)] == rows[id]["answer"].strip()
        assert abs(sample.duration - rows[id]["duration"]) < 1
    assert samples["23"].duration == pytest.approx(1788.7667, abs=1e-4)  # of video_meta_info.json; the row says 1789
    assert samples["487"].evidence[0] > samples["487"].evidence[1]  # unsorted, as published
    assert samples["4677"].evidence[0][1] > samples["4677"].evidence[1][0]  # overlapping, as published
    assert len(set(samples["9961"].options)) < len(samples["9961"].options)  # a repeated choice is kept


@real
def test_qvhighlights():
    samples, report = real_samples("qvhighlights/highlight_val_release.jsonl", "qvhighlights")
    assert (len(samples), report.dropped) == (1550, [])
    assert samples["2579"].evidence == ((82, 150),)
    assert samples["2579"].video == "NUsG9BgSes0_210.0_360.0.mp4"
    unlabelled, _ = real_samples("qvhighlights/highlight_test_release.part.jsonl", "qvhighlights")
    assert {s.evidence for s in unlabelled.values()} == {()}


@real
def test_charades_sta():
    samples, report = real_samples("charades_sta/charades_sta_test.txt", "charades_sta")
    assert samples["E6DLK_1"] == Sample(
        "E6DLK_1", "E6DLK.mp4", "a person sits in a chair.", (), None, ((3.1, 11.8),), 27.25
    )
    assert report.notes["spans that end after the video"] == 57
    clipped, _ = real_samples("charades_sta/charades_sta_test.txt", "charades_sta", clip_spans=True)
    assert all(s.evidence[0][1] <= s.duration for s in clipped.values())
    as_json, _ = real_samples("charades_sta/temporal_grounding_charades.json", "charades_sta")
    assert as_json == samples


@real
def test_activitynet():
    samples, report = real_samples("activitynet/train.json", "activitynet")
    second = samples["train:v_ehGHCYKzyZ8_1"]  # published with a space before it
    assert second.question == "A man and woman are in a living room demonstrating exercises."
    raw = [
        x for entry in json.loads((REAL / "activitynet/train.json").read_text()).values() for x in entry["sentences"]
    ]
    assert any("\n" in sentence for sentence in raw) and any("  " in sentence for sentence in raw)
    assert [s.question for s in samples.values()] == [" ".join(sentence.split()) for sentence in raw]
    assert report.notes["spans that end after the video"] == 6
    assert [s.evidence for s in samples.values() if (60.71, 61.29) in s.evidence]  # published reversed
    assert report.notes["reversed spans swapped"] == 1
    assert report.notes["spans of zero length"] == 1
    first, _ = real_samples("activitynet/val_1.json", "activitynet")
    second, _ = real_samples("activitynet/val_2.json", "activitynet")
    assert {s.video for s in second.values()} <= {s.video for s in first.values()}
    assert not set(first) & set(second)  # the file's name keeps the two apart


@real
def test_tacos_frames_become_seconds():
    samples, report = real_samples("tacos/test.json", "tacos")
    one = samples["test:s30-d52.avi_0"]
    assert one.video == "s30-d52.avi"
    assert one.evidence == ((141 / 29.4, 354 / 29.4),)
    assert one.duration == 7346 / 29.4
    assert report.notes["spans that end after the video"] == 5
    assert (
        len({(s.video, s.evidence) for s in samples.values()}) == 120 < len(samples) == 362
    )  # one span, several sentences


@real
def test_ego4d_nlq():
    samples, report = real_samples("format_examples/ego4d_nlq_gt.json", "ego4d_nlq")
    assert (len(samples), len(report.dropped)) == (16, 4)
    assert {reason for _, reason in report.dropped} == {"empty question"}
    one = samples["clip-00_ann-000_0"]
    assert (one.video, one.evidence, one.duration) == ("clip-00.mp4", ((117.332, 126.502),), 480)
    lines, _ = real_samples("format_examples/ego4d_nlq_moment_detr_style.jsonl", "ego4d_nlq")
    assert lines["q_0"].evidence == ((12.5, 20.033),)


@real
def test_videomme():
    samples, _ = real_samples("format_examples/videomme_style.json", "videomme")
    assert samples["901-1"].options == ("1.", "2.", "3.", "None of the above.")
    assert samples["902-3"].options == ("(b)(a)(c).", "(a)(b)(c).", "A cat.", "B is the answer.")
    assert (samples["902-3"].answer, samples["902-3"].video, samples["902-3"].duration) == (
        "D",
        "BBBBBBBBBBB.mp4",
        None,
    )
    assert samples["902-3"].meta == {"length": "long"}


@real
def test_mlvu_folder():
    samples, report = real_samples("mlvu", "mlvu")
    assert report.dropped == [
        ("2_needle.json, row 31", "the answer is not among the options"),
        ("7_topic_reasoning:2", "empty question"),
    ]
    assert samples["1_plotQA:1"].video == "1_plotQA/movie101_6.mp4"
    assert samples["1_plotQA:1"].answer == "A"
    assert samples["8_sub_scene:1"].options == ()
    assert samples["8_sub_scene:1"].answer is None
    assert samples["8_sub_scene:1"].meta["reference"].startswith("The man with long braids")
    one_task, _ = real_samples("mlvu/4_count.json", "mlvu")
    assert len(one_task) == 30


@real
def test_lvbench():
    samples, report = real_samples("lvbench/lvbench_clean.json", "lvbench")
    assert len(samples) == 196
    one = samples["lvbench_clean:1"]
    assert one.options == ("The little lion", "The bat-eared fox", "The ostrich", "The deer")
    assert (one.answer, one.evidence, one.kind) == ("D", ((52, 52),), "entity recognition")
    assert [s.video for s in samples.values() if not s.evidence] == ["00000044.mp4"]  # "08:17-None"
    assert report.notes["reversed spans swapped"] == 2  # "50:54-50:15" and "38:14-38:02"
    assert "event understanding + temporal grounding" in {s.kind for s in samples.values()}
    original, _ = real_samples("format_examples/lvbench_video_info_meta_style.jsonl", "lvbench")
    assert original["9002"].question == "Who enters at 102:07?"
    assert original["9002"].options == ("A boy", "A girl", "A dog", "Nobody")
    assert original["9002"].evidence == ((6127, 6160),)
    assert original["9002"].kind == "entity recognition + reasoning"


@real
def test_longvideobench():
    samples, _ = real_samples("longvideobench/lvb_val.json", "longvideobench")
    assert {len(s.options) for s in samples.values()} == {3, 4, 5}
    one = samples["7F9IrtSHmc0_0"]
    assert (one.answer, one.options[2], one.video, one.duration) == ("C", "speaking", "7F9IrtSHmc0.mp4", 422.66)
    assert (one.kind, one.meta, one.evidence) == ("O2E", {"length": "600"}, ())


@real
def test_plm_video():
    grounding, _ = real_samples("format_examples/plm_videobench_rtloc.jsonl", "plm_video")
    assert (grounding["11"].evidence, grounding["11"].duration) == (((0.5, 40 / 24),), 85 / 24)
    choices, _ = real_samples("format_examples/plm_videobench_fgqa.jsonl", "plm_video")
    assert [(s.answer, s.options) for s in choices.values()] == [
        ("A", ("left hand", "right hand")),
        ("B", ("both hands", "left hand")),
    ]
    assert {s.meta["group"] for s in choices.values()} == {"fg_0"}


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
