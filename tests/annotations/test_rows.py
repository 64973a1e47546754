"""Rows: what is read from a file and a field, and what is refused, by file, row and field."""

import json

import pytest
from rowfiles import RECORD, write_rows

from annotations.rows import DataError, Sample
from annotations.samples import read_samples, read_with_report, write_samples

# ---------------------------------------------------------------- our own records


def test_record_as_list_and_as_lines(tmp_path):
    sample = Sample(
        id="x:1",
        video="a.mp4",
        question="Which pattern?",
        options=("dots", "lines", "grid"),
        answer="C",
        evidence=((3.0, 8.0), (10.0, 12.5)),
        duration=16.0,
    )
    assert read_samples(write_rows(tmp_path / "x.jsonl", [RECORD])) == [sample]
    (tmp_path / "x.json").write_text(json.dumps([RECORD], indent=1))
    assert read_samples(tmp_path / "x.json") == [sample]


def test_save_and_load_is_the_identity(tmp_path):
    samples = [
        Sample("1", "a.mp4", "Qué?", ("x", "y"), "B", ((0.1, 0.30000000000000004),), 7.5, "fine", {"level": 2}),
        Sample("2", "b.mp4", "Describe.", (), None, (), None, meta={"reference": "A dog."}),
        Sample("3", "b.mp4", "Where?", (), None, ((1.0, 2.0),), 5.0),
        Sample("4", "b.mp4", "A letter without options?", (), "C", (), 5.0),
        Sample("5", "b.mp4", "Options without an answer?", ("x", "y"), None, (), 5.0),
    ]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_samples(tmp_path / "s.jsonl") == samples


@pytest.mark.parametrize("field", sorted(RECORD))
def test_missing_field_names_file_row_and_field(tmp_path, field):
    broken = {key: value for key, value in RECORD.items() if key != field}
    with pytest.raises(DataError, match=rf"x\.jsonl: row 2, field '{field}': is missing"):
        read_samples(write_rows(tmp_path / "x.jsonl", [RECORD, broken]))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("video", 3, "expected str, got 3"),
        ("question", None, "expected str, got None"),
        ("options", "A", "expected list"),
        ("options", [1, 2], "expected texts"),
        ("options", list("abcdefghijklmnopqrstuvwxyz!"), "at most 26 options"),
        ("answer", 2, "expected str or null"),
        ("glue", [[3]], r"expected \[start, end\], got \[3\]"),
        ("glue", [3, 8], "got 3"),
        ("glue", [[3, "8"]], "expected"),
        ("glue", [[3, float("nan")]], "nan"),
        ("glue", "not a list", "expected a list"),
        ("duration", "16", "expected int or float"),
        ("duration", 0, "expected a positive number"),
        ("duration", True, "expected int or float"),
        ("id", None, "expected str or int"),
    ],
)
def test_wrong_values_name_file_row_and_field(tmp_path, field, value, message):
    with pytest.raises(DataError, match=rf"x\.jsonl: row 1, field '{field}': .*{message}"):
        read_samples(write_rows(tmp_path / "x.jsonl", [{**RECORD, field: value}]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("[]", "no rows"),
        ("video,question", "row 1: not JSON"),
        ("[{]", "not JSON: line 1"),
        (json.dumps(RECORD) + '\n{"video": ', "row 2: not JSON"),
        ("[3]", "row 1: expected a JSON object, got int"),
    ],
)
def test_files_that_are_no_records(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json: {message}"):
        read_samples(tmp_path / "x.json")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: no such file"):
        read_samples(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="a folder, not a file"):
        read_samples(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a UTF-8 text"):
        read_samples(tmp_path / "x.json")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: (needs pyarrow|cannot be read as parquet)"):
        read_samples(tmp_path / "x.parquet", "videomme")
    with pytest.raises(DataError, match="unknown format 'nextqa'; known: records, nextgqa"):
        read_samples(tmp_path / "x.json", "nextqa")


def test_two_rows_with_one_id(tmp_path):
    with pytest.raises(DataError, match="two rows have the id '7'"):
        read_samples(write_rows(tmp_path / "x.jsonl", [{**RECORD, "id": 7}, {**RECORD, "id": "7"}]))


def test_glue_as_a_text(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**RECORD, "glue": "[[3, 8], [10.5, 11]]"}])
    assert read_samples(path)[0].evidence == ((3.0, 8.0), (10.5, 11.0))


def test_dropped_rows_are_logged_and_reported(tmp_path, caplog):
    rows = [RECORD, {**RECORD, "question": " "}, {**RECORD, "answer": "stripes"}, {**RECORD, "answer": "(D)"}]
    path = write_rows(tmp_path / "x.jsonl", rows + [RECORD] * 96)
    assert read_samples(path)[0].id == "x:1"
    wrong = "the answer is not among the options"
    assert f"3 rows dropped: 1 x empty question: x:2; 2 x {wrong}: row 3 'stripes', row 4 '(D)'" in caplog.text
    _, report = read_with_report(path)
    assert report.kept == 97
    assert sorted(report.dropped) == [
        ("row 3", wrong, "stripes"),
        ("row 4", wrong, "(D)"),
        ("x:2", "empty question", ""),
    ]
    with pytest.raises(DataError, match="none of the 1 rows can be used: 1 x empty question: y:1"):
        read_samples(write_rows(tmp_path / "y.jsonl", rows[1:2]))


def test_a_file_of_which_many_rows_cannot_be_used_is_refused(tmp_path):
    broken = [{**RECORD, "answer": f"no {k}"} for k in range(6)]
    path = write_rows(tmp_path / "x.jsonl", [RECORD] * 94 + broken)
    with pytest.raises(
        DataError, match=r"x\.jsonl: 6 of 100 rows cannot be used, more than 5%: .*row 95 'no 0', row 96"
    ):
        read_samples(path)
    assert len(read_samples(write_rows(tmp_path / "y.jsonl", [RECORD] * 95 + broken[:5]))) == 95
