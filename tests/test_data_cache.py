"""Tokens are made in one reading, kept under all that they depend on, and never believed where a file is damaged."""

import json
import multiprocessing
import os
import warnings

import numpy as np
import pytest
from data_fixtures import CHATML_MARKED, CONVERSATIONS, tokenizer

import specjax.data as data
from specjax.data import cache, identity, read, tokens
from specjax.data.read import opened

SIZES = {"length": 64, "batch_size": 2}
ROWS = [{"instruction": f"Say {n}", "response": f"It is {n}."} for n in range(40)]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch):
    """How often a source was read from start to end, and how many examples were tokenised."""
    counts = {"readings": 0, "examples": 0}

    def count(where, *args, **options):
        reading = opened(where, *args, **options)

        def rows():
            counts["readings"] += 1
            return reading.rows()

        return reading._replace(rows=rows)

    def documents(examples, *args, **options):
        counts["examples"] += len(examples)
        return chat_documents(examples, *args, **options)

    chat_documents = tokens.documents
    monkeypatch.setattr(tokens, "opened", count)
    monkeypatch.setattr(tokens, "documents", documents)
    return counts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source, folder, **options):
    return data.load(source, tokenizer(), **(SIZES | {"template": "chatml", "cache": folder} | options))


def kept(folder, kind="tokens"):
    return sorted(folder.glob(f"*.{kind}"))


# --- one reading


def test_a_run_reads_its_rows_once_and_its_second_start_makes_no_tokens(source, folder, counted, monkeypatch):
    from specjax import build
    from specjax.config import get_config

    config = get_config()
    config.data.train, config.data.template, config.data.length = str(source), "chatml", 64
    for place, starts in (("off", [(1, 40), (2, 80)]), (str(folder), [(1, 40), (1, 40)])):
        config.data.cache = place
        counted.update(readings=0, examples=0)
        fingerprints = []
        for expected in starts:
            train, sets = build.data_of(config, tokenizer())
            assert (counted["readings"], counted["examples"]) == expected
            assert train.report["rows"] + sets["heldout"].report["rows"] == 40
            fingerprints.append((train.fingerprint, sets["heldout"].fingerprint))
        assert len(set(fingerprints)) == 1
    # Every call for itself gives the same.
    counted.update(readings=0)
    assert (build.train_data_of(config, tokenizer()).fingerprint, counted["readings"]) == (fingerprints[0][0], 0)


def test_another_seed_holds_out_other_rows_and_makes_no_tokens(source, folder, counted):
    first = load(source, folder, holdout=(0.25, "eval"))
    other = load(source, folder, holdout=(0.25, "eval"), seed=1)
    assert first.fingerprint != other.fingerprint
    assert other.fingerprint == load(source, False, holdout=(0.25, "eval"), seed=1).fingerprint
    assert counted["examples"] == 40 + 40  # the first, and the one without a cache
    assert len(kept(folder)) == 1 and len(kept(folder, "sides")) == 2


# --- hits and misses


SOURCES = {
    "instruct": (ROWS, {"template": "chatml"}),
    "text": (["The cat sat. " * 30, "", "on the mat"], {}),
    "prompt": ([{"prompt": "a" * n, "completion": "b" * 9} for n in range(1, 70, 9)], {"template": None}),
    "messages": ([{"messages": turns} for turns in CONVERSATIONS.values()], {"template": "chatml"}),
    "preference": ([{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in range(1, 70, 9)], {"template": None}),
}


@pytest.mark.parametrize("overlong", ["drop", "truncate", "keep_end", "split"])
@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_found_in_the_cache_is_what_is_made_without(folder, kind, overlong, counted):
    rows, options = SOURCES[kind]
    if kind == "preference" and overlong != "drop":
        return
    options = options | {"overlong": overlong, "holdout": (0.3, "train")}
    without, first = (load(rows, place, **options) for place in (False, folder))
    counted.update(examples=0)
    second = load(rows, folder, **options)
    assert counted["examples"] == 0
    assert without.fingerprint == first.fingerprint == second.fingerprint
    assert without.report == first.report == second.report
    assert (without.template, without.end_of_turn) == (second.template, second.end_of_turn)
    assert all(np.array_equal(a, b) for a, b in zip(without.batch(3).values(), second.batch(3).values(), strict=True))


def test_a_list_a_file_and_a_folder_are_found_again_and_a_generator_is_read_once(tmp_path, source, folder, counted):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "datasets"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "a.jsonl", ROWS)
    for place in (ROWS, source, tmp_path / "files", tmp_path / "datasets"):
        first = load(place, folder)
        counted.update(examples=0)
        assert load(place, folder).fingerprint == first.fingerprint
        assert counted["examples"] == 0
    assert len(kept(folder)) == 3  # a folder of one file has the contents of that file
    assert (
        load(iter(ROWS), folder, holdout=(0.5, "train")).fingerprint
        == load(ROWS, folder, holdout=(0.5, "train")).fingerprint
    )
    assert load([{"text": "a", "odd": object()}], folder, template=None).report["documents"] == 1
    assert len(kept(folder)) == 3


def test_neither_length_nor_order_nor_the_parts_nor_the_path_make_tokens_anew(tmp_path, source, folder, counted):
    load(source, folder)
    moved = source.rename(tmp_path / "moved.jsonl")
    counted.update(examples=0)
    for options in ({"length": 32}, {"batch_size": 4}, {"packing": False}, {"overlong": "split"}, {"seed": 3}):
        load(moved, folder, **options)
    load(moved, folder, holdout=(0.25, "eval"))
    assert counted["examples"] == 0


def test_another_tokenizer_template_or_content_is_another_file(tmp_path, source, folder, monkeypatch):
    made = []

    def other(tok=None, **options):
        """Makes one more file, and has the data that no cache would change."""
        with_cache, without = (
            data.load(source, tok or tokenizer(), cache=place, **(SIZES | {"template": "chatml"} | options))
            for place in (folder, False)
        )
        made.append(with_cache)
        assert len(kept(folder)) == len(made) and with_cache.fingerprint == without.fingerprint

    other()
    other(template="zephyr")
    jinja = tmp_path / "own.jinja"
    for text in (CHATML_MARKED, CHATML_MARKED.replace("<|im_start|>", "<|im_start|> ")):
        jinja.write_text(text)
        other(template=str(jinja))
        other(tokenizer(chat_template=text), template=None)
    for tok in (tokenizer("gpt2"), tokenizer(eos_token="<|eot_id|>"), tokenizer(adds_bos=False)):
        other(tok)
    other(format="instruct")
    write(source, [*ROWS[:-1], {"instruction": "Say 39", "response": "It is 38."}])
    other()
    monkeypatch.setattr(identity, "code", lambda: "of another version")
    other()


def test_the_code_that_makes_tokens_is_part_of_the_key():
    names = {file.name for file in identity._files_below(identity.files("specjax.data"))}
    assert {"chat.py", "formats.py", "read.py", "tokens.py", "turns.py", "chatml.jinja"} <= names


# --- nothing is believed that is not whole


@pytest.mark.parametrize("damage", ["truncated", "a bit", "the header", "longer", "empty", "a size", "nothing of ours"])
@pytest.mark.parametrize("kind", ["tokens", "sides"])
def test_a_damaged_file_is_made_anew_and_that_is_said_once(source, folder, counted, damage, kind):
    whole = load(source, folder, holdout=(0.25, "train"))
    (path,) = kept(folder, kind)
    good = path.read_bytes()
    bad = {
        "truncated": good[:-7],
        "a bit": good[:-9] + bytes([good[-9] ^ 4]) + good[-8:],
        "the header": b"{" + good,
        "longer": good + b"\0",
        "empty": b"",
        "a size": good.replace(b'"arrays": {', b'"arrays": {"x": ["<i8", 1152921504606846976], ', 1),
        "nothing of ours": b"[1, 2]\n",
    }[damage]
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match=f"prepared data in {path} can't be used .* it is made anew") as said:
        again = load(source, folder, holdout=(0.25, "train"))
    assert len(said) == 1 and path.read_bytes() == good
    assert again.fingerprint == whole.fingerprint
    assert load(source, folder, holdout=(0.25, "train")).fingerprint == whole.fingerprint


def test_a_folder_that_can_not_be_written_costs_a_warning(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not be kept in .*file \(.*\): the next start makes it again"):
        loaded = load(source, tmp_path / "file")
    assert loaded.fingerprint == load(source, False).fingerprint


def test_a_write_that_fails_or_is_killed_leaves_nothing_that_is_believed(source, folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        first = load(source, folder)
    assert not any(folder.iterdir())
    monkeypatch.undo()
    killed = folder / "0.tokens.1.partial"
    killed.write_bytes(b"half")
    load(source, folder)
    assert killed.exists()  # another process may be writing it
    os.utime(killed, (1, 1))
    assert load(ROWS, folder).fingerprint == first.fingerprint
    assert not killed.exists() and {path.suffix for path in folder.iterdir()} == {".tokens"}


def test_a_file_that_is_written_to_while_it_is_read_is_not_kept(source, folder, monkeypatch):
    reader = read._jsonl

    def meanwhile(path):
        yield from reader(path)
        path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(read, "_jsonl", meanwhile)
    load(source, folder)
    assert not kept(folder)


def test_what_was_made_is_the_files_own_pages_and_a_kill_leaves_nothing(source, folder):
    for _ in range(2):
        loaded = load(source, folder)
        assert isinstance(loaded._tokens, np.memmap) and {path.suffix for path in folder.iterdir()} == {".tokens"}
    assert not isinstance(load(source, False)._tokens, np.memmap)
    with cache.Spool(folder, {"tokens": "int32"}) as spool:
        spool.add("tokens", np.arange(5, dtype=np.int32))
        made = spool.arrays()["tokens"]
    assert isinstance(made, np.memmap) and made.tolist() == [0, 1, 2, 3, 4]
    assert {path.suffix for path in folder.iterdir()} == {".tokens"}  # it has no name that could be left behind


def test_a_disk_that_fills_up_while_tokens_grow_loses_none(folder):
    spool, wanted = cache.Spool(folder, {"tokens": "int32", "trained": "bool"}), np.arange(30, dtype=np.int32)
    spool.add("tokens", wanted[:10])
    spool.add("trained", wanted[:7] > 3)
    file = spool._files["tokens"]

    class Full:
        def __init__(self):
            self.seek, self.read, self.close = file.seek, file.read, file.close

        def write(self, data):
            file.write(data[:5])
            raise OSError(28, "No space left on device")

    spool._files["tokens"] = Full()
    spool.add("tokens", wanted[10:20])
    spool.add("tokens", wanted[20:])
    spool.add("trained", wanted[7:9] > 3)
    made = spool.arrays()
    assert np.array_equal(made["tokens"], wanted) and np.array_equal(made["trained"], wanted[:9] > 3)


# --- several processes


def start(source, folder, barrier, answers):
    tok = tokenizer()
    barrier.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(source, tok, template="chatml", cache=folder, holdout=(0.25, "train"), **SIZES)
    answers.put(loaded.fingerprint)


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_start_at_once_have_the_same_data(source, folder, locks, monkeypatch):
    if not locks:

        def none(*args):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", none)
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(3), fork.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside JAX's threads: these children make no array
        children = [fork.Process(target=start, args=(source, folder, barrier, answers)) for _ in range(3)]
        for child in children:
            child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found == [load(source, False, holdout=(0.25, "train")).fingerprint] * 3
    assert {path.suffix for path in folder.iterdir()} <= {".tokens", ".sides", ".lock"}
    assert len(kept(folder)) == len(kept(folder, "sides")) == 1


def test_one_process_makes_what_the_others_wait_for(source, folder, counted):
    """A process that waits for its turn finds the file made, and makes nothing."""
    import threading

    path = folder / "held.tokens"
    order = []

    def second():
        with cache.turn(path):
            order.append("second")

    with cache.turn(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


# --- chunks and progress


def test_chunks_are_bounded_by_rows_and_by_characters(monkeypatch):
    long = [{"text": "The cat sat. " * 20}] * 10
    whole = data.load(long, tokenizer(), cache=False, **SIZES)
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 600)
    done = []
    apart = data.load(long, tokenizer(), cache=False, progress=lambda *args: done.append(args), **SIZES)
    assert done == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert apart.fingerprint == whole.fingerprint


def test_progress_knows_how_many_rows_a_file_of_lines_has_once_it_is_in_the_key(source, folder):
    done = []
    load(source, folder, progress=lambda *args: done.append(args))
    load(source, folder, progress=lambda *args: done.append(args))
    load(source, False, progress=lambda *args: done.append(args))
    assert done == [(40, 40), (40, None)]
