"""Every source is read alike, and every mistake in the data is one sentence that says where."""

import csv
import json
import urllib.request

import pytest
from data_fixtures import refuse, tokenizer

import specjax.data as data
from specjax.data.read import read
from specjax.errors import UserError

ROWS = [{"instruction": f"Say {n}", "response": f"{n}, «naïf» 🙂\n\nend"} for n in range(5)]
SIZES = {"length": 64, "batch_size": 2}


def rows(source, split="train"):
    return [dict(row) for _, row in read(source, split)]


def places(source, split="train"):
    return [where for where, _ in read(source, split)]


def jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


# --- sources


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": lambda path: jsonl(path, ROWS),
    "blank_lines.jsonl": lambda path: path.write_text("\n".join(["", *map(json.dumps, ROWS), "  ", ""])),
    "byte_order_mark.jsonl": lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in ROWS), "utf-8-sig"),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "under_a_key.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "json_lines.json": lambda path: jsonl(path, ROWS),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert rows(tmp_path / name) == ROWS
    assert rows(str(tmp_path / name)) == ROWS
    fingerprint = data.instruct(tmp_path / name, tokenizer(), template="chatml", **SIZES).fingerprint
    assert fingerprint == data.instruct(ROWS, tokenizer(), template="chatml", **SIZES).fingerprint


def test_a_text_file_is_one_document_whole(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    assert rows(tmp_path / "a.txt") == [{"text": "One.\n\nTwo.\n"}]


def test_a_folder_holds_files_of_several_kinds_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("three")
    (tmp_path / "b.txt").write_text("two")
    jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["text"] for row in rows(tmp_path)] == ["one", "two", "three"]


def test_a_folder_of_splits_gives_the_one_asked_for(tmp_path):
    for name in ("train-00000", "train-00001", "test", "constrained"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert [row["text"] for row in rows(tmp_path)] == ["train-00000", "train-00001"]
    assert [row["text"] for row in rows(tmp_path, "test")] == ["test"]


def test_a_datasets_folder_is_read_with_or_without_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}).save_to_disk(
        str(tmp_path / "splits")
    )
    assert rows(tmp_path / "plain") == ROWS
    assert rows(tmp_path / "splits") == ROWS[:3] and rows(tmp_path / "splits", "test") == ROWS[3:]
    refuse(lambda: rows(tmp_path / "splits", "dev"), "no split 'dev', only train, test")


def test_rows_may_be_given_as_they_are():
    assert rows(["one", {"text": "two"}]) == [{"text": "one"}, {"text": "two"}]
    refuse(lambda: rows(["one", 2]), "row 2 is a JSON int")


# --- places


def test_every_row_knows_its_place(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    assert places(tmp_path / "a.jsonl") == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    write_csv(tmp_path / "a.csv")
    assert places(tmp_path / "a.csv")[:3] == [f"{tmp_path}/a.csv:{line}" for line in (2, 5, 8)]  # three lines a row
    write_parquet(tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet")[-1] == f"{tmp_path}/a.parquet row 5"


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    refuse(lambda: rows(path), rf"^{path}:3 is not JSON: Expecting ',' delimiter at column")
    path.write_text('{"text": "a"}\n["b"]\n')
    refuse(lambda: rows(path), rf"^{path}:2 is a JSON list")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text" "b"}]')
    refuse(lambda: rows(tmp_path / "a.json"), r"a\.json:2 is not JSON")
    (tmp_path / "b.json").write_text("3")
    refuse(lambda: rows(tmp_path / "b.json"), r"b\.json holds a JSON int")
    (tmp_path / "a.csv").write_text("text,source\na,b\nc\n")
    refuse(lambda: rows(tmp_path / "a.csv"), r"a\.csv:3 does not have the 2 fields")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    refuse(lambda: rows(tmp_path / "a.parquet"), r"a\.parquet is not a whole Parquet file")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refuse(lambda: rows(tmp_path / "a.txt"), r"a\.txt is not UTF-8 text: .* at byte 3")
    (tmp_path / "a.docx").write_text("")
    refuse(lambda: rows(tmp_path / "a.docx"), r"a\.docx is of no known kind: use one of \.jsonl")


def test_what_is_not_there_is_named(tmp_path):
    refuse(lambda: rows(tmp_path / "none.jsonl"), r"no such data file or folder: .*none\.jsonl")
    refuse(lambda: rows("none.csv"), r"no such data file or folder: none\.csv")
    (tmp_path / "empty").mkdir()
    refuse(lambda: rows(tmp_path / "empty"), "holds no data")


def test_a_hub_name_without_a_network_is_named(monkeypatch):
    import datasets.config

    # Where the hub's name is not known, `datasets` would ask for half a minute, and print each try.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    refuse(lambda: rows("some-org/some-data"), "^'some-org/some-data' is neither a file .* nor a dataset that the hub")
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_field_may_be_as_long_as_a_document_and_the_modules_own_limit_stays(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "a" * (before + 1) + "\nb\n")
    found = []
    for _, row in read(tmp_path / "a.csv"):
        found.append(len(row["text"]))
        assert csv.field_size_limit() == before
    assert found == [before + 1, 1]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "text\n"), ("b.jsonl", "\n\n")]
)
def test_empty_data_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refuse(lambda: data.load(tmp_path / name, tokenizer(), **SIZES), f"{name} is empty")


def test_blank_texts_alone_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    refuse(lambda: data.text(tmp_path / "a.txt", tokenizer(), **SIZES), r"none of the 1 rows of .*a\.txt")


def test_all_rows_over_the_length_is_an_error_that_tells_the_shortest():
    source = [{"prompt": "a" * n, "completion": "b"} for n in (90, 100)]
    refuse(
        lambda: data.load(source, tokenizer(adds_bos=False), **SIZES),
        r"^all 2 rows of the data are over the length of 64 tokens \(the shortest has 92\): raise length",
    )


def test_a_row_that_lacks_the_response_is_named(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", [ROWS[0], {"instruction": "Say"}])
    load = lambda: data.load(path, tokenizer(), template="chatml", **SIZES)  # noqa: E731
    refuse(load, rf"^{path}:2 lacks 'response' \(it has instruction\)")
    jsonl(path, [ROWS[0], {"instruction": "Say", "response": None}])
    refuse(load, rf"^{path}:2 lacks 'response'")
    jsonl(path, [ROWS[0], {"instruction": "Say", "response": 3}])
    refuse(load, rf"^{path}:2: 'response' is a int, and must be a str")
    refuse(lambda: data.load([{"prompt": "a", "completion": None}], tokenizer(), **SIZES), "^row 1 lacks 'completion'")


def test_compressed_lines_are_read_and_a_torn_file_is_named(tmp_path):
    import gzip

    import pyarrow as pa

    text = "".join(json.dumps({"text": f"row {n} \u2028"}, ensure_ascii=False) + "\n" for n in range(50)).encode()
    for name, content in (
        ("a.jsonl.gz", gzip.compress(text)),
        ("b.jsonl.zst", pa.compress(text, "zstd", asbytes=True)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert list(read(path))[49] == (f"{path}:50", {"text": "row 49 \u2028"})
        path.write_bytes(content[:-20])
        with pytest.raises(UserError, match=f"{name} is not a whole (gzip|zstd) file"):
            list(read(path))


def test_what_lies_behind_an_address_is_brought_once_and_called_by_it(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    for name, content in (("train-0.jsonl", '{"text": "a"}\n'), ("test.jsonl", "{}\n{"), ("notes.md", "no rows")):
        store.pipe(f"/bucket/{name}", content.encode())
    for _ in range(2):
        for source in ("memory://bucket", "memory://bucket/train-0.jsonl"):
            assert list(read(source)) == [("memory:///bucket/train-0.jsonl:1", {"text": "a"})]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train-0.jsonl"]
    store.pipe("/bucket/train-0.jsonl", b'{"text": "another"}\n')
    assert [row["text"] for _, row in read("memory://bucket")] == ["another"]
    with pytest.raises(UserError, match="^memory:///bucket/test.jsonl:2 is not JSON"):
        list(read("memory://bucket/test.jsonl"))
    for source, said in (("memory://none.jsonl", "can't be read .FileNotFoundError"), ("zz://a", "not known: zz")):
        with pytest.raises(UserError, match=said):
            list(read(source))
