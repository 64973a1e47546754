"""Samples: loading, videos, mixtures, and the command that sums a file up."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rowfiles import RECORD, write_rows

import annotations.samples as samples_module
import config as configuration
from annotations.rows import DataError, Sample
from annotations.samples import (
    Entry,
    check_videos,
    load_samples,
    load_test,
    load_training,
    mislabelled,
    missing_videos,
    out_of_reach,
    read_mixture,
    read_samples,
    read_with_report,
    video_path,
)
from config import Config, ConfigError
from rollout import view_video

ROOT = Path(__file__).resolve().parents[2]


def test_evidence_stays_as_published(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**RECORD, "glue": [[-0.2, 3], [15, 17], [18, 20]]}])
    samples, report = read_with_report(path)
    assert samples[0].evidence == ((-0.2, 3), (15, 17), (18, 20))
    assert report.notes["spans that start below 0"] == 1
    assert report.notes["spans that end after the video"] == 2
    path = write_rows(tmp_path / "y.jsonl", [{**RECORD, "glue": [[-1, 99]], "duration": None}])
    assert read_samples(path)[0].evidence == ((-1, 99),)


def test_wrong_labels_are_off_by_as_much_as_asked_and_stay_so():
    true = [Sample(f"{k}", "x.mp4", "?", ("a", "b"), "A", ((5.0, 8.0), (10.0, 11.0)), 15.0) for k in range(200)]
    wrong = list(mislabelled(true, 3.0, 0))
    assert wrong == list(mislabelled(true, 3.0, 0)) != list(mislabelled(true, 3.0, 1))
    assert [replace(sample, evidence=true[0].evidence) for sample in wrong] == true
    first = [sample.evidence[0][0] - 5.0 for sample in wrong]
    assert min(first) < -2.9 and max(first) > 2.9 and abs(sum(first)) < 0.4 * len(first)
    ends = [span for sample in wrong for span in sample.evidence]
    assert all(2.0 <= start <= end <= 14.0 for start, end in ends) and len(set(ends)) == len(ends)
    at_the_border = replace(true[0], evidence=((0.0, 15.0),))
    [[(start, end)]] = [sample.evidence for sample in mislabelled([at_the_border], 3.0, 0)]
    assert 0 <= start < end <= 15


def test_only_training_in_the_built_in_world_has_wrong_labels(tmp_path):
    folder = tmp_path / "world-v2-seed0-20s-3events"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.mp4").touch()
    for split in ("train", "test"):
        write_rows(folder / f"{split}-1.jsonl", [{**RECORD, "video": "train/a.mp4", "glue": [[5, 8]], "duration": 20}])
    config = Config(
        train_data="world", test_data="world", cache=str(tmp_path), world_train_videos=1, world_test_videos=1
    )
    [exact], [noisy] = load_training(config), load_training(replace(config, world_label_noise=3.0))
    assert exact.samples[0].evidence == ((5, 8),) != noisy.samples[0].evidence
    [tested] = load_test(replace(config, world_label_noise=3.0))
    assert tested.evidence == ((5, 8),)


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("suffix", [".mpg", ".flv", ".wmv", ".3gp", ".m2ts", ".vob", ".gif", ".ogv", ".xyz"])
def test_a_video_is_found_with_any_suffix(tmp_path, suffix):
    (tmp_path / f"x{suffix}").touch()
    assert video_path(f"x{suffix}", tmp_path) == str(tmp_path / f"x{suffix}")
    if suffix != ".xyz":
        assert video_path("x", tmp_path) == str(tmp_path / f"x{suffix}")


def test_a_video_is_found_with_a_suffix_in_capitals(tmp_path):
    (tmp_path / "w.MP4").touch()
    assert video_path("w", tmp_path) == video_path("w.avi", tmp_path) == str(tmp_path / "w.MP4")


def test_video_paths(tmp_path):
    (tmp_path / "v_1.mkv").touch()
    (tmp_path / "id_0.0_150.0.webm").touch()
    assert video_path("v_1", None) == "v_1.mp4"
    assert video_path("s30-d52.avi", None) == "s30-d52.avi"
    assert video_path("v_1", tmp_path) == str(tmp_path / "v_1.mkv")
    assert video_path("id_0.0_150.0", tmp_path) == str(tmp_path / "id_0.0_150.0.webm")
    assert video_path("v_2", tmp_path) == str(tmp_path / "v_2.mp4")
    assert video_path("/elsewhere/v.mp4", tmp_path) == "/elsewhere/v.mp4"


def test_other_spellings_of_a_name_are_found(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "caf\u00e9.mp4").touch()
    (folder / "e\u0301t\u00e9.mkv").touch()
    (folder / "plain").touch()
    for video, found in [
        ("b\\caf\u00e9.mp4", "caf\u00e9.mp4"),  # from Windows
        ("b/cafe\u0301.mp4", "caf\u00e9.mp4"),  # from macOS
        ("b\\cafe\u0301", "caf\u00e9.mp4"),
        ("b/plain", "plain"),
    ]:
        assert video_path(video, tmp_path) == str(folder / found), video
        assert video_path(f"{tmp_path}/{video}", None) == str(folder / found), video
    assert video_path("b/gone\\x", tmp_path) == str(tmp_path / "b/gone\\x.mp4")


def test_a_missing_video_costs_one_look_at_the_file_and_one_into_its_folder(tmp_path, monkeypatch):
    asked, listed = [], []
    isfile, listdir = os.path.isfile, os.listdir
    rows = [{**RECORD, "video": f"v/{k // 2}", "id": f"s{k}"} for k in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "3.webm").write_text("")
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    samples, report = read_with_report(path, video_root=tmp_path)
    assert report.missing == 18 and samples[6].video == samples[7].video == str(tmp_path / "v" / "3.webm")
    assert len(asked) == 10 + 1 and listed == [str(tmp_path / "v")]


def test_an_empty_name_is_refused(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [RECORD, {**RECORD, "id": "q", "video": " "}])
    with pytest.raises(DataError, match=r"x\.jsonl: question 'q', field 'video': is empty"):
        read_samples(path)


def test_missing_videos_are_skipped_only_when_asked(tmp_path):
    (tmp_path / "a.mp4").touch()
    rows = [{**RECORD, "id": 1}, {**RECORD, "id": 2, "video": "b"}, {**RECORD, "id": 3, "video": "b"}]
    samples = read_samples(write_rows(tmp_path / "x.jsonl", rows), video_root=tmp_path)
    missing = str(tmp_path / "b.mp4")
    assert missing_videos(samples) == [missing]
    with pytest.raises(DataError, match=f"1 video files are missing: {missing}"):
        check_videos(samples)
    assert [s.id for s in check_videos(samples, skip_missing=True)] == ["1"]
    with pytest.raises(DataError, match="all 1 video files are missing"):
        check_videos(samples[1:], skip_missing=True)


def test_command_prints_a_summary_and_checks_videos(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["samples.py", *map(str, arguments)])
        samples_module.main()
        return capsys.readouterr().out

    (tmp_path / "a.mp4").touch()
    path = write_rows(tmp_path / "x.jsonl", [RECORD, {**RECORD, "video": "b"}, {**RECORD, "question": ""}])
    lines = run("--path", path).splitlines()
    assert "rows kept           2" in lines
    assert "rows dropped        1" in lines
    assert "  1 x empty question: x:3" in lines
    assert "spans per question  2: 2" in lines
    assert "durations, s        min 16.0, median 16.0, max 16.0, unknown 0" in lines
    assert "reversed spans swapped: 3" in lines
    with pytest.raises(SystemExit, match="error: 1 video files are missing"):  # Python prints a text, and its code is 1
        run("--path", path, "--videos", tmp_path)
    assert f"videos missing      1\n  {tmp_path / 'b.mp4'}\n" in capsys.readouterr().out
    run("--path", path, "--videos", tmp_path, "--skip_missing", "--out", tmp_path / "out.jsonl")
    assert [s.id for s in read_samples(tmp_path / "out.jsonl")] == ["x:1"]
    with pytest.raises(SystemExit, match=r"none\.json: no such file$"):
        run("--path", tmp_path / "none.json")


# ---------------------------------------------------------------- evidence


@pytest.mark.parametrize(
    ("evidence", "duration", "reason"),
    [
        ([(3000.0, 8000.0)], 20.0, "evidence beyond the video, in milliseconds?"),
        ([(30.0, 30.5), (20.0, 21.0)], 20.0, "evidence beyond the video, in milliseconds?"),
        ([(30000.0, 30001.0)], 20.0, "evidence beyond the video"),
        ([(3.0, 3.0), (5.0, 5.0)], 20.0, "evidence of zero length"),
        ([(3.0, 3.0)], None, "evidence of zero length"),
        ([(-3.0, -1.0)], 20.0, "evidence before the video"),
        ([(-3.0, 0.0)], None, "evidence before the video"),
        ([(3.0, 3.0), (5.0, 6.0)], 20.0, None),
        ([(-1.0, 0.5)], 20.0, None),
        ([(19.9, 50.0)], 20.0, None),
        ([(3000.0, 8000.0)], None, None),
    ],
)
def test_evidence_that_no_span_can_hit(evidence, duration, reason):
    assert out_of_reach(evidence, duration) == reason


def test_a_file_with_such_evidence_is_loaded_with_one_warning(tmp_path, caplog):
    rows = [RECORD, {**RECORD, "glue": [[3000, 8000]]}, {**RECORD, "glue": [[4, 4]]}, {**RECORD, "glue": []}]
    samples = read_samples(write_rows(tmp_path / "x.jsonl", rows))
    assert len(samples) == 4 and len(caplog.records) == 1
    assert "no span can hit the evidence of 2 of 3 questions: " in caplog.text
    assert "1 x evidence beyond the video, in milliseconds?: x:2 '[(3000.0, 8000.0)]'; " in caplog.text
    assert "1 x evidence of zero length: x:3 '[(4.0, 4.0)]'" in caplog.text


def training(small_world, **changes) -> Config:
    """The configuration of a run on the small world's training videos."""
    return Config(train_data=str(small_world["train"]), video_root=str(small_world["train"].parent), **changes)


def changed(small_world, path, change):
    """A file of the small world's training rows, each changed by its number."""
    rows = [json.loads(line) for line in small_world["train"].read_text().splitlines()]
    return write_rows(path, [{**row, **change(k)} for k, row in enumerate(rows)])


def test_training_on_evidence_that_no_span_can_hit_is_refused(small_world, tmp_path, caplog):
    config = training(small_world)
    assert len(load_training(config)[0]) > 10 and not caplog.records
    config.train_data = str(changed(small_world, tmp_path / "ms.jsonl", lambda k: {"glue": [[3000, 8000]]}))
    with pytest.raises(DataError, match=r"ms\.jsonl: .* the evidence of (\d+) of \1 samples: .*milliseconds"):
        load_training(config)
    # Without durations, those of a few files tell.
    unknown = {"glue": [[3000, 8000]], "duration": None}
    config.train_data = str(changed(small_world, tmp_path / "unknown.jsonl", lambda k: unknown))
    with pytest.raises(DataError, match=r"unknown\.jsonl: .* 8 of 8 samples: .*milliseconds\?: .* in 20\.0 s"):
        load_training(config)
    some = changed(small_world, tmp_path / "some.jsonl", lambda k: {"glue": [[3, 3]]} if k < 2 else {})
    config.train_data = str(some)
    caplog.clear()
    assert load_training(config) and "the evidence of 2 of" in caplog.text


def test_a_sample_that_does_not_fit_its_file_is_named_once(small_world, samples, caplog):
    config = Config(model=str(configuration.BUILT_IN), fps=1, budget=176, v_min=4, v_max=16)
    late = f"sample late ({samples[0].video}): the file has 20.0 s, not the 25.0 s of its row"
    for sample, expected in [
        (samples[0], None),
        (replace(samples[0], duration=20.9), None),
        (replace(samples[0], id="late", duration=25.0), late),
        (replace(samples[0], id="ms", evidence=((3000.0, 8000.0),), duration=None), "sample ms .*in milliseconds?"),
    ]:
        caplog.clear()
        for _ in range(2):
            view_video(sample, config)
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == (expected is not None)
        assert all(text == expected or re.match(expected.replace("?", r"\?"), text) for text in texts)


# ---------------------------------------------------------------- missing videos in training


def test_missing_training_videos_are_counted_at_load(small_world, tmp_path, caplog):
    config = training(small_world, max_failed_videos=0.2)
    config.train_data = str(
        changed(small_world, tmp_path / "one.jsonl", lambda k: {"video": "gone.mp4"} if k < 2 else {})
    )
    assert load_training(config)
    assert re.search(r"one\.jsonl: the videos of 2 of \d+ samples are missing: .*gone\.mp4", caplog.text)
    half = changed(small_world, tmp_path / "half.jsonl", lambda k: {"video": f"gone{k}.mp4"} if k % 2 else {})
    config.train_data = config.test_data = str(half)
    for load in (load_training, load_test):
        with pytest.raises(DataError, match=r"half\.jsonl: .* missing: .*gone1\.mp4, .*; check video_root \(max"):
            load(config)
    assert load_test(replace(config, test_data="")) == []


# ---------------------------------------------------------------- mixtures


def test_a_mixture_names_files_formats_and_weights(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("- data: a.jsonl\n- {data: test.csv, format: nextgqa, video_root: videos, weight: 0.5}\n")
    assert read_mixture(path) == [Entry("a.jsonl"), Entry("test.csv", "nextgqa", "videos", 0.5)]


def test_zoom_zeros_own_mixtures_are_read(tmp_path):
    path = tmp_path / "stage1.yaml"
    path.write_text(
        "datasets:\n"
        "    - json_path: ./annotations/GVideoQA-anet.json\n"
        "      data_folder: ./datasets/activitynet/videos\n"
        "    - json_path: b.json\n"
    )
    expected = [Entry("./annotations/GVideoQA-anet.json", video_root="./datasets/activitynet/videos"), Entry("b.json")]
    assert read_mixture(path) == expected


def test_a_world_that_cannot_be_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="world_events = 9: at most 6 events, one colour each, not 9"):
        load_samples("world", "train", Config(cache=str(tmp_path), world_events=9))


# Lists that name the one before them nine times: 9 to the power of 8 words, were they written out.
LISTS = [", ".join([word] * 9) for word in ("x", "*a", "*b", "*c", "*d", "*e", "*f", "*g")]
BOMB = ", ".join(f"&{name} [{words}]" for name, words in zip("abcdefgh", LISTS, strict=True))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "not YAML"),
        ("[" * 20_000, "not YAML"),
        ("datasets:\n- {data: a}\n", "entry 1, field 'data': is not known; there are json_path, data_folder"),
        ("datasets:\n- {data_folder: a}\n", "entry 1, field 'json_path': is missing"),
        ("- {3: a}\n", "entry 1, field '3': is not known"),
        ("data: a.jsonl\n", "a mixture is a list"),
        ("- a.jsonl\n", "entry 1: expected a JSON object"),
        ("- data: a.jsonl\n- {data: b, wieght: 2}\n", "entry 2, field 'wieght': is not known"),
        ("- {weight: 2}\n", "entry 1, field 'data': is missing"),
        (f"- {{data: [{BOMB}]}}\n", "entry 1, field 'data': expected str, got"),
        ("- {data: a, weight: 1.0e+12}\n", "entry 1, field 'weight': expected at most 1000"),
        (f"- {{data: a, format: {'x' * 100_000}}}\n", "entry 1, field 'format': 'xxx"),
        ("- {data: a, weight: 0}\n", "entry 1, field 'weight': expected a positive number"),
        ("- {data: a, format: csv}\n", "entry 1, field 'format': 'csv' is none of"),
    ],
)
def test_mistakes_in_a_mixture_are_named(tmp_path, content, expected):
    path = tmp_path / "mixture.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=expected) as error:
        read_mixture(path)
    assert len(str(error.value)) < 500
