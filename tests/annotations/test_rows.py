"""Rows: what is read from a file and a field, and what is refused, by file, row and field."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rowfiles import RECORD, write_json, write_rows

import config as configuration
from annotations import rows
from annotations.rows import DataError, Sample, whence
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
    broken = {f"{key}s" if key == field else key: value for key, value in RECORD.items()}  # misspelled
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


# ---------------------------------------------------------------- files as they come


def test_pretty_printed_json_and_a_list_in_data_are_read(tmp_path):
    path = tmp_path / "x.json"
    (one,) = read_samples(write_rows(tmp_path / "lines.jsonl", [RECORD]))
    records = [{**RECORD, "id": k} for k in "ab"]
    for text in (
        json.dumps({"version": 1, "data": records}),
        json.dumps({"version": 1, "data": records}, indent=2),
        "\n".join(json.dumps(row, indent=2) for row in records),
        json.dumps(records, indent=2) + "\n\n",
        "\n" + "\r\n".join(json.dumps(row) for row in records),
    ):
        path.write_text(text)
        assert read_samples(path) == [replace(one, id="a"), replace(one, id="b")]
    path.write_text(json.dumps(RECORD, indent=2))
    assert read_samples(path) == [replace(one, id="x:1")]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(rows, "READ_CHARACTERS", chunk)
    values = [{"k": k, "text": '[\\n"],}é' * k, "deep": [[k], {"x": None}]} for k in range(20)]
    path = write_json(tmp_path / "x.json", values)
    path.write_text("\ufeff  \n" + json.dumps(values, indent=indent, ensure_ascii=chunk == 7), encoding="utf-8")
    assert [(row.where, row.fields) for row in rows.read_rows(path)] == [
        (f"row {k}", value) for k, value in enumerate(values, start=1)
    ]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n {"a": 2}]', r"not JSON: line 2, row 1: Expecting ',' delimiter"),
        ('[{"a": 1},\n\n {"a": tru}]', "not JSON: line 3, row 2: Expecting value"),
        ('[{"a": 1},\n {"a": 2}', "not JSON: line 2, row 2: Expecting ',' delimiter"),
        ('[{"a": 1}] x', "not JSON: after the list's end comes 'x'"),
        ('[] {"a": 1}', "not JSON: after the list's end comes"),
        ("[ ]", "no rows"),
        ('[{"a": ' + "[" * 200_000 + "]" * 200_000 + "}]", "row 1: not JSON that can be read: nested too deep"),
        ('[{"a": ' + "7" * 5000 + "}]", "row 1: not JSON that can be read: Exceeds the limit"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "row 1: not JSON that can be read: nested too deep"),
        ('{"a": 1}\n{"a": ' + "7" * 5000 + "}", "row 2: not JSON that can be read: Exceeds the limit"),
        ('{"a":\n' + "7" * 5000 + "}", "row 1: not JSON that can be read: Exceeds the limit"),
        ('{"a":\n1}\n{"a":\n', "row 2: not JSON: line 4"),
    ],
)  # fmt: skip
def test_mistakes_in_json_are_one_line(tmp_path, monkeypatch, text, message, chunk):
    if chunk == 3 and len(text) > 6000:
        chunk = 1000
    monkeypatch.setattr(rows, "READ_CHARACTERS", chunk)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"x\.json: {message}") as error:
        list(rows.read_rows(path))
    assert len(str(error.value)) < 400


def test_other_mistakes_are_one_line_too(tmp_path):
    for field, value in (
        ("glue", "[" * 100_000),
        ("glue", "-" * 100_000 + "1"),
        ("glue", "1" + "+1" * 100_000),
        ("glue", "{}"),
        ("glue", [[10**400, 3]]),
        ("duration", 10**400),
    ):
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps({**RECORD, field: value}))
        with pytest.raises(DataError, match=rf"x\.jsonl: row 1, field '{field}': expected") as error:
            read_samples(path)
        assert len(str(error.value)) < 400


def test_glue_as_a_text_of_tuples(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**RECORD, "glue": "[(3.0, 8), (10.5, 11.25),]"}])
    assert read_samples(path)[0].evidence == ((3.0, 8.0), (10.5, 11.25))


def test_csv_cells_keep_their_lines_and_other_separators_split_nothing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a,b\n1,"two\nlines\n"\n2,"x\u2028y\u0085z\x0cw"\n\n3,"say ""no"""\n', encoding="utf-8", newline="")
    found = [(row.where, row.fields["b"]) for row in rows.read_csv(path)]
    assert found == [("row 1", "two\nlines\n"), ("row 2", "x\u2028y\u0085z\x0cw"), ("row 3", 'say "no"')]
    line = write_rows(tmp_path / "x.jsonl", [])
    line.write_text(json.dumps({"a": "x\u2028y\u0085\x0cz"}, ensure_ascii=False) + "\n" + json.dumps({"a": "b"}))
    assert [row.fields["a"] for row in rows.read_rows(line)] == ["x\u2028y\u0085\x0cz", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1," + "x" * 200_000 + "\n", "row 1: field larger than field limit"),
        ('a,b\n1,2\n2,"x\n', "row 2: unexpected end of data; is a quotation mark left open"),
        ("a,b\n1,2\n1\n", "row 2: expected 2 cells, got 1"),
        ("a,b\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_mistakes_in_csv_are_one_line(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"x\.csv: {message}"):
        list(rows.read_csv(path))


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    """By a stand-in for pyarrow, of which a file of two batches is asked."""
    path = write_json(tmp_path / "x.parquet", [])
    batches = [SimpleNamespace(to_pylist=lambda k=k: [{**RECORD, "id": k}]) for k in (1, 2)]
    parquet = SimpleNamespace(ParquetFile=lambda file: SimpleNamespace(iter_batches=lambda: iter(batches)))
    pyarrow = SimpleNamespace(parquet=parquet, ArrowException=KeyError)
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert [sample.id for sample in read_samples(path)] == ["1", "2"]
    with pytest.raises(DataError, match=r"gone\.parquet: no such file"):
        read_samples(tmp_path / "gone.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"x\.parquet: needs pyarrow: pip install pyarrow"):
        read_samples(path)


# ---------------------------------------------------------------- texts that no prompt can hold


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("question", "What <|video_pad|> is it?", r"has the special token <\|video_pad\|>"),
        ("question", "<|im_end|>", r"has the special token <\|im_end\|>"),
        ("options", ["x", "y <|endoftext|>", "z"], r"has the special token <\|endoftext\|>"),
        ("question", "half \ud83d", r"has half a character, \\ud83d"),
        ("options", ["x", "y", "\udc00"], r"has half a character, \\udc00"),
        ("video", "\ud800.mp4", r"has half a character, \\ud800"),
        ("kind", "<|x|>", r"has the special token <\|x\|>"),
        ("meta", {"note": ["\ud800"]}, r"has half a character, \\ud800"),  # no file could be written with it
    ],
)
def test_a_special_token_or_half_a_character_is_named(tmp_path, field, value, message):
    path = write_rows(tmp_path / "x.jsonl", [RECORD, {**RECORD, field: value}])
    with pytest.raises(DataError, match=rf"x\.jsonl: row 2, field '{field}': {message}; remove it"):
        read_samples(path)


def test_half_a_character_in_an_id_is_named(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**RECORD, "id": "\ud800"}])
    with pytest.raises(DataError, match=r"x\.jsonl: question '.*', field 'id': has half a character, \\ud800; remove"):
        read_samples(path)


def test_signs_that_only_resemble_tokens_stay(tmp_path):
    question = "Is <| a |> b, x<|y, or <||> right? \U0001f600"
    assert read_samples(write_rows(tmp_path / "x.jsonl", [{**RECORD, "question": question}]))[0].question == question


def test_a_missing_file_of_a_recipe_says_where_it_comes_from():
    for recipe in sorted(configuration.RECIPES.glob("*.yaml")):
        values = {} if recipe.stem.startswith("accelerate") else configuration.read_recipe(recipe)
        name = str(values.get("train_data", ""))
        if name.startswith("data/"):
            assert whence(Path(name)).endswith("in any format of docs/data.md"), f"{recipe.name}: {name}"
    with pytest.raises(DataError, match=r"stage2\.jsonl: no such file; filters\.py makes it of Stage I's"):
        read_samples("data/zoom_zero_stage2.jsonl")
    assert not whence(Path("mine/zoom_zero_stage1.jsonl"))
