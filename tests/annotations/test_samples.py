"""Samples: loading, videos, mixtures, and the command that sums a file up."""

import subprocess
import sys
from pathlib import Path

import pytest
from rowfiles import RECORD, write_rows

from annotations.rows import DataError
from annotations.samples import (
    Entry,
    check_videos,
    missing_videos,
    read_mixture,
    read_samples,
    read_with_report,
    video_path,
)

ROOT = Path(__file__).resolve().parents[2]


def test_evidence_stays_as_published(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**RECORD, "glue": [[-0.2, 3], [15, 17], [18, 20]]}])
    samples, report = read_with_report(path)
    assert samples[0].evidence == ((-0.2, 3), (15, 17), (18, 20))
    assert report.notes["spans that start below 0"] == 1
    assert report.notes["spans that end after the video"] == 2
    path = write_rows(tmp_path / "y.jsonl", [{**RECORD, "glue": [[-1, 99]], "duration": None}])
    assert read_samples(path)[0].evidence == ((-1, 99),)


# ---------------------------------------------------------------- videos


def test_video_paths(tmp_path):
    (tmp_path / "v_1.mkv").touch()
    (tmp_path / "id_0.0_150.0.webm").touch()
    assert video_path("v_1", None) == "v_1.mp4"
    assert video_path("s30-d52.avi", None) == "s30-d52.avi"
    assert video_path("v_1", tmp_path) == str(tmp_path / "v_1.mkv")
    assert video_path("id_0.0_150.0", tmp_path) == str(tmp_path / "id_0.0_150.0.webm")
    assert video_path("v_2", tmp_path) == str(tmp_path / "v_2.mp4")
    assert video_path("/elsewhere/v.mp4", tmp_path) == "/elsewhere/v.mp4"


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


def run(*arguments):
    command = [sys.executable, "-m", "annotations.samples", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_prints_a_summary_and_checks_videos(tmp_path):
    (tmp_path / "a.mp4").touch()
    path = write_rows(tmp_path / "x.jsonl", [RECORD, {**RECORD, "video": "b"}, {**RECORD, "question": ""}])
    done = run("--path", path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "rows kept           2" in lines
    assert "rows dropped        1" in lines
    assert "  1 x empty question: x:3" in lines
    assert "spans per question  2: 2" in lines
    assert "durations, s        min 16.0, median 16.0, max 16.0, unknown 0" in lines
    assert "reversed spans swapped: 3" in lines
    done = run("--path", path, "--videos", tmp_path)
    assert done.returncode == 1
    assert f"videos missing      1\n  {tmp_path / 'b.mp4'}\n" in done.stdout
    assert done.stderr.startswith("error: 1 video files are missing")
    done = run("--path", path, "--videos", tmp_path, "--skip_missing", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0
    assert [s.id for s in read_samples(tmp_path / "out.jsonl")] == ["x:1"]
    assert run("--path", tmp_path / "none.json").stderr.endswith("none.json: no such file\n")


# ---------------------------------------------------------------- mixtures


def test_a_mixture_names_files_formats_and_weights(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("- data: a.jsonl\n- {data: test.csv, format: nextgqa, video_root: videos, weight: 0.5}\n")
    assert read_mixture(path) == [Entry("a.jsonl"), Entry("test.csv", "nextgqa", "videos", 0.5)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "not YAML"),
        ("data: a.jsonl\n", "a mixture is a list"),
        ("- a.jsonl\n", "entry 1: expected a JSON object"),
        ("- data: a.jsonl\n- {data: b, wieght: 2}\n", "entry 2, field 'wieght': is not known"),
        ("- {weight: 2}\n", "entry 1, field 'data': is missing"),
        ("- {data: a, weight: 0}\n", "entry 1, field 'weight': expected a positive number"),
        ("- {data: a, format: csv}\n", "entry 1, field 'format': 'csv' is none of"),
    ],
)
def test_mistakes_in_a_mixture_are_named(tmp_path, content, expected):
    path = tmp_path / "mixture.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=expected):
        read_mixture(path)
