import csv
import json

import pytest

from peftjax.core.errors import PeftError
from peftjax.train.data.files import file_dataset, read_rows
from peftjax.train.data.language.corpus import read_corpus


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def held(tmp_path):
    return write(tmp_path / "dev.csv", 'text,label\n"a, b",10\nc,2\n')


def test_csv_with_quotes_and_numeric_order(tmp_path, held):
    train = write(tmp_path / "train.csv", "text,label\nx,10\ny,2\nz,1\n")
    data = file_dataset(train, held)
    assert data.label_names == ("1", "2", "10")
    assert data.train.labels == (2, 1, 0)
    assert data.evaluation.texts == ("a, b", "c")
    assert data.evaluation.labels == (2, 1)


def test_tsv_keeps_quotes_and_odd_line_ends(tmp_path):
    text = "sentence\tlabel\n\"open quote\tpos\nit's\u2028one\x0crow \tneg\r\n"
    data = file_dataset(write(tmp_path / "t.tsv", text), tmp_path / "t.tsv")
    assert data.train.texts == ('"open quote', "it's\u2028one\x0crow ")
    assert data.label_names == ("neg", "pos")


def test_parquet_and_chosen_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"body": ["a", "b"], "topic": [3, 20]})
    parquet.write_table(table, tmp_path / "t.parquet")
    path = tmp_path / "t.parquet"
    data = file_dataset(path, path, text_column="body", label_column="topic")
    assert data.label_names == ("3", "20")
    assert data.train.texts == ("a", "b")


def test_held_out_without_an_evaluation_file(tmp_path):
    rows = [json.dumps({"content": f"text {i}", "class": "ab"[i % 2]}) for i in range(200)]
    path = write(tmp_path / "t.jsonl", "\n".join(rows))
    data = file_dataset(path)
    assert len(data.train) + len(data.evaluation) == 200
    assert 8 <= len(data.evaluation) <= 35
    assert not set(data.train.texts) & set(data.evaluation.texts)
    assert data == file_dataset(path)


def test_json_lists_and_long_csv_fields(tmp_path):
    rows = [{"text": "a" * 200_000, "label": 1}, {"text": "b", "label": 0}]
    listed = write(tmp_path / "t.json", json.dumps(rows, indent=1))
    lines = write(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))
    table = write(tmp_path / "t.csv", "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    limit = csv.field_size_limit()
    for path in (listed, lines, table):
        assert file_dataset(path, path).train.texts == ("a" * 200_000, "b")
    assert csv.field_size_limit() == limit


def test_structs_of_parquet_lose_the_nulls_that_other_rows_filled_in(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"m": [{"role": "user", "content": "a"}]}, {"m": [{"role": "tool", "call": {"x": [1, None]}}]}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert [row for _, row in read_rows(tmp_path / "t.parquet")] == rows


GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "has no rows"),
        ("t.csv", "text,label\n", "has no rows"),
        ("t.json", "[]", "has no rows"),
        ("t.json", "[3]", "item 1 is not a JSON object"),
        ("t.jsonl", '{"text": "\\ud800", "label": 1}', "line 1 is not JSON: .*surrogate"),
        ("t.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not JSON: .*deeply"),
        ("t.jsonl", GOOD + '{"text": \n', "line 2 is not JSON"),
        ("t.jsonl", GOOD + "3\n", "line 2 is not a JSON object"),
        ("t.jsonl", GOOD + '{"text": "b"}\n', "line 2 lacks the column 'label'"),
        ("t.jsonl", GOOD + '{"text": "b", "label": 1.5}', "line 2: the label is 1.5"),
        ("t.jsonl", GOOD + '{"text": 3, "label": 1}', "line 2: the text is 3"),
        ("t.csv", "text,label\na,1\nb\n", "line 3 lacks the column 'label'"),
        ("t.csv", "text,label\na,1,2\n", "line 2 has 3 fields, the header has 2"),
        ("t.csv", 'text,label\n"a"b,1\n', "line 2 is not CSV"),
        ("t.tsv", "txet\tlabel\na\tb\n", "columns are 'txet', 'label'.*did you mean 'txet'"),
        ("t.parquet", "nothing", "is not a Parquet file"),
        ("t.xml", "<a/>", "unknown format '.xml'"),
        ("t.jsonl", GOOD, "too few rows"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if name == "t.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(PeftError, match=message):
        file_dataset(write(tmp_path / name, content))


def test_missing_file_and_latin1(tmp_path):
    with pytest.raises(PeftError, match="does not exist"):
        file_dataset(tmp_path / "none.csv")
    (tmp_path / "l.csv").write_bytes(b"text,label\n\xe9,1\n")
    with pytest.raises(PeftError, match="not UTF-8"):
        file_dataset(tmp_path / "l.csv")


def test_label_unseen_in_training(tmp_path, held):
    train = write(tmp_path / "train.csv", "text,label\nx,10\ny,1\n")
    with pytest.raises(PeftError, match=r"dev.csv, line 3: the label '2' does not occur"):
        file_dataset(train, held)


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_a_column_name_that_stands_twice_is_an_error(tmp_path, name):
    comma = "," if name.endswith(".csv") else "\t"
    file = write(tmp_path / name, comma.join(["text", "label", "text"]) + "\n" + comma.join("a1b") + "\n")
    with pytest.raises(PeftError, match=f"{name}: the header has the column 'text' twice"):
        list(read_rows(file))


def test_a_column_of_parquet_that_stands_twice_is_an_error(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(PeftError, match=r"t.parquet: the header has the column 'text' twice"):
        list(read_rows(tmp_path / "t.parquet"))


def test_one_class_only_is_an_error(tmp_path, held):
    train = write(tmp_path / "train.csv", "text,label\nx,10\ny,10\n")
    with pytest.raises(PeftError, match=r"train.csv: every row has the label '10'; .* two classes"):
        file_dataset(train, held)


def test_rows_without_a_label_are_named_and_minus_one_may_be_the_opposite_of_one(tmp_path):
    unlabeled = write(tmp_path / "test.csv", "text,label\nx,-1\ny,0\nz,1\n")
    with pytest.raises(PeftError, match=r"test.csv: some rows have the label -1.*leave such rows out"):
        file_dataset(unlabeled, unlabeled)
    train = write(tmp_path / "train.csv", "text,label\nx,0\ny,1\n")
    with pytest.raises(PeftError, match=r"test.csv, line 2: the label -1 marks a row without a label"):
        file_dataset(train, unlabeled)
    signs = write(tmp_path / "signs.csv", "text,label\nx,-1\ny,1\n")
    assert file_dataset(signs, signs).label_names == ("-1", "1")


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_zero_byte_in_a_table_is_named_with_its_line(name, tmp_path):
    mark = "," if name == "rows.csv" else "\t"
    (tmp_path / name).write_text(f"text{mark}label\na{mark}b\nc\0{mark}d\n")
    with pytest.raises(PeftError, match=rf"{name}, line 3 has a zero byte"):
        file_dataset(tmp_path / name)


def test_utf_16_without_a_mark_is_no_running_text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat", encoding="utf-16-le")
    with pytest.raises(PeftError, match="zero byte"):
        read_corpus(tmp_path / "text.txt")
