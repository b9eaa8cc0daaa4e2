"""Packing keeps every token once and wastes little; batches are a pure function of (data, seed, step)."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from data_fixtures import tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import specjax.data as data
from specjax.data import loader
from specjax.data.chat import Document
from specjax.data.loader import COLUMNS, Data, shuffled
from specjax.data.pack import best_fit, plan, ranges
from specjax.data.tally import Tally
from specjax.errors import UserError


def make(sizes, *, length, batch_size=2, seed=0, packing=True):
    """Documents of random tokens (never 0) and masks."""
    rng = np.random.default_rng(7)
    offsets = np.cumsum([0, *sizes])
    tokens = rng.integers(1, 1000, offsets[-1]).astype(np.int32)
    trained = rng.random(offsets[-1]) < 0.5
    arguments = {"length": length, "batch_size": batch_size, "seed": seed, "packing": packing}
    return Data(tokens, trained, offsets, tokenizer=None, **arguments), tokens, trained, offsets


def rows_of(batches):
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in COLUMNS}


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in COLUMNS)


sizes_and_length = st.integers(2, 40).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(1, 3 * length), min_size=1, max_size=60), st.just(length), st.booleans(), st.integers(1, 4)
    )
)


@pytest.mark.rule(6)
@given(sizes_and_length)
@settings(max_examples=150, deadline=None)
def test_every_token_and_every_target_is_there_exactly_once(case):
    sizes, length, packing, batch_size = case
    loaded, tokens, trained, offsets = make(sizes, length=length, batch_size=batch_size, packing=packing)
    batches = list(loaded.once())
    assert all(batch[name].shape == (batch_size, length) for batch in batches for name in COLUMNS)
    rows = rows_of(batches)
    inside = rows["segment_ids"] > 0
    assert sorted(rows["tokens"][inside].tolist()) == sorted(tokens.tolist())
    for name in COLUMNS:
        assert not rows[name][~inside].any()
    # The pairs (token, target) that count are those of the documents, also across the cuts of long ones.
    last = np.zeros(len(tokens), bool)
    last[offsets[1:] - 1] = True
    wanted = [(tokens[i], tokens[i + 1]) for i in range(len(tokens)) if not last[i] and trained[i + 1]]
    counted = rows["loss_mask"] == 1
    assert sorted(zip(rows["tokens"][counted], rows["targets"][counted], strict=True)) == sorted(wanted)
    assert set(np.unique(rows["loss_mask"])) <= {0.0, 1.0}
    assert loaded.report["loss_tokens"] == len(wanted)
    assert loaded.most_documents == rows["segment_ids"].max()


@given(sizes_and_length)
@settings(max_examples=100, deadline=None)
def test_segments_are_numbered_from_one_and_positions_restart_in_each(case):
    sizes, length, packing, batch_size = case
    loaded, *_ = make(sizes, length=length, batch_size=batch_size, packing=packing)
    rows = rows_of(loaded.once())
    for segments, positions in zip(rows["segment_ids"], rows["positions"], strict=True):
        full = int((segments > 0).sum())
        assert not segments[full:].any()  # padding only at the end
        steps = np.diff(segments[:full])
        assert ((steps == 0) | (steps == 1)).all()
        assert full == 0 or segments[0] == 1
        if not packing:
            assert segments.max(initial=0) <= 1
        restart = np.concatenate([[True], steps == 1]) if full else np.empty(0, bool)
        assert (positions[:full][restart] == 0).all()
        assert (np.diff(positions[:full])[~restart[1:]] == 1).all()


def test_longest_pieces_go_first_and_each_into_the_fullest_row_with_room():
    assert best_fit(np.array([5, 6, 2]), 8).tolist() == [1, 0, 0]
    assert best_fit(np.array([3, 3, 5, 5]), 8).tolist() == [1, 0, 0, 1]


@given(arrays(np.int64, st.integers(1, 200), elements=st.integers(1, 64)))
@settings(max_examples=200, deadline=None)
def test_no_row_overflows_and_no_two_rows_could_have_been_one(sizes):
    load = np.sort(np.bincount(best_fit(sizes, 64), weights=sizes))
    assert load[-1] <= 64 and load[0] > 0
    assert len(load) == 1 or load[0] + load[1] > 64


@given(st.lists(st.sets(st.integers(1, 63), max_size=8), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_packing_is_within_the_bound_of_best_fit_decreasing(cuts):
    # Full rows cut to pieces: the fewest rows are known.
    sizes = np.concatenate([np.diff([0, *sorted(cut), 64]) for cut in cuts])
    assert best_fit(sizes, 64).max() + 1 <= 11 / 9 * len(cuts) + 6 / 9


def test_packing_of_usual_lengths_wastes_less_than_one_percent():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(4.5, 0.8, 20_000).astype(int) + 1, 1024)
    packed = plan(np.concatenate([[0], np.cumsum(sizes)]), 1024)
    assert sizes.sum() / ((len(packed.rows) - 1) * 1024) > 0.99


def test_a_long_text_goes_on_in_another_row_and_loses_no_target():
    loaded, tokens, *_ = make([10], length=4, batch_size=3)
    rows = rows_of(loaded.once())
    order = np.argsort([np.flatnonzero(tokens == row[0])[0] for row in rows["tokens"]])
    assert rows["tokens"][order].reshape(-1)[:10].tolist() == tokens.tolist()
    assert rows["targets"][order].reshape(-1)[:10].tolist() == [*tokens[1:], 0]
    assert rows["positions"][order].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]


@pytest.mark.rule(6)
def test_a_batch_is_a_pure_function_of_seed_and_step():
    sizes = np.random.default_rng(1).integers(1, 30, 200)
    loaded, *_ = make(sizes, length=32, batch_size=4)
    steps = [0, 7, 3, 100, 7, 31, 0]
    first = [loaded.batch(step) for step in steps]
    again, *_ = make(sizes, length=32, batch_size=4)
    assert all(equal(again.batch(step), batch) for step, batch in reversed(list(zip(steps, first, strict=True))))
    other, *_ = make(sizes, length=32, batch_size=4, seed=1)
    assert not equal(other.batch(0), first[0])
    assert other.fingerprint == loaded.fingerprint  # the seed orders the data and does not change it


@pytest.mark.rule(6)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_rows_are_parts_of_the_same_global_batch(shards):
    loaded, *_ = make(np.random.default_rng(1).integers(1, 30, 200), length=32, batch_size=8)
    for step in (0, 2, 5, 50):
        parts = rows_of([loaded.batch(step, rows) for rows in np.split(np.arange(8), shards)])
        assert equal(parts, whole := loaded.batch(step))
        assert loaded.tokens_in(step) == np.count_nonzero(whole["segment_ids"])


def test_micro_batch_i_has_every_kth_row_of_the_batch_from_i_on():
    loaded, *_ = make(np.random.default_rng(1).integers(1, 30, 200), length=32, batch_size=8)
    for step in (0, 3, 50):
        whole = loaded.batch(step)
        assert all(np.array_equal(whole[name], micro[0]) for name, micro in loaded.micro_batches(step, 1).items())
        for count in (2, 4, 8):
            micro = loaded.micro_batches(step, count)
            for i in range(count):
                assert equal(
                    {name: values[i] for name, values in micro.items()}, loaded.batch(step, np.arange(i, 8, count))
                )
            rows = np.array([8 // count - 1])  # as a process asks whose devices have the last rows
            part = loaded.micro_batches(step, count, rows)
            assert all(np.array_equal(part[name], micro[name][:, rows]) for name in COLUMNS)
            assert part["tokens"].shape == (count, 1, 32)
    with pytest.raises(UserError, match="8 rows does not divide into 3 micro-batches"):
        loaded.micro_batches(0, 3)


def test_row_ids_name_the_rows_of_a_batch():
    loaded, *_ = make(np.random.default_rng(1).integers(1, 30, 200), length=32, batch_size=4)
    in_order = rows_of(loaded.once())
    for step in (0, 7, 100):
        ids = loaded.row_ids(step)
        assert ids.shape == (4,) and ids.dtype == np.int64
        assert equal(loaded.batch(step), {name: values[ids] for name, values in in_order.items()})


def test_every_batch_has_the_columns_and_their_dtypes():
    loaded, *_ = make([5, 6, 3], length=8)
    assert {name: values.dtype.name for name, values in loaded.batch(0).items()} == COLUMNS


def test_documents_that_lie_apart_make_the_data_that_they_make_end_to_end(monkeypatch):
    """As those of a cache's file do, of which some are held out: nothing is copied, and no digit is another."""
    sizes = np.random.default_rng(2).integers(1, 70, 60)
    loaded, tokens, trained, offsets = make(sizes, length=32, batch_size=4)
    starts = offsets[:-1] + 3 * np.arange(60) // 7 * 2
    where = ranges(starts, np.diff(offsets))
    wide, marks = np.full(where[-1] + 5, 999, np.int32), np.ones(where[-1] + 5, bool)
    wide[where], marks[where] = tokens, trained
    monkeypatch.setattr(loader, "BLOCK", 100)
    apart = Data(wide, marks, offsets, starts=starts, tokenizer=loaded.tokenizer, length=32, batch_size=4)
    assert apart.fingerprint == loaded.fingerprint and apart.report == loaded.report
    assert np.array_equal(apart.tokens, loaded.tokens) and np.array_equal(apart.loss_mask, loaded.loss_mask)
    column = np.arange(len(tokens), dtype=np.float32)
    for one, other in zip(*(each.with_column("place", column).once() for each in (apart, loaded)), strict=True):
        assert equal(one, other)
    apart.tokenizer = loaded.tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))
    assert apart.preview(20) == loaded.preview(20)


def test_an_added_column_has_its_value_at_every_token_and_leaves_the_data_as_it_was():
    loaded, tokens, *_ = make(np.random.default_rng(1).integers(1, 70, 60), length=32, batch_size=4)
    weights = tokens / 1000
    wider = loaded.with_column("weight", weights).with_column("twice", 2 * weights)
    for batch in (wider.batch(3), *wider.once(), wider.micro_batches(3, 2)):
        assert set(batch) == {*COLUMNS, "weight", "twice"} and batch["weight"].dtype == np.float32
        inside = batch["segment_ids"] > 0
        assert np.array_equal(batch["weight"][inside], (batch["tokens"][inside] / 1000).astype(np.float32))
        assert np.array_equal(batch["twice"][inside], (batch["tokens"][inside] / 500).astype(np.float32))
        assert not batch["weight"][~inside].any()
    assert set(loaded.batch(3)) == set(COLUMNS) and equal(loaded.batch(3), wider.batch(3))
    assert wider.fingerprint == loaded.fingerprint and wider.tokens is loaded.tokens
    with pytest.raises(UserError, match="a column 'targets' already"):
        loaded.with_column("targets", weights)
    with pytest.raises(UserError, match="a column 'weight' already"):
        wider.with_column("weight", weights)
    with pytest.raises(UserError, match=r"'weight' has the shape \(3,\), but the data has \d+ tokens"):
        loaded.with_column("weight", weights[:3])


def test_rows_of_a_pass_are_parts_of_the_same_batches():
    loaded, *_ = make(np.random.default_rng(1).integers(1, 30, 150), length=32, batch_size=8)
    assert loaded.num_rows % 8 and loaded.num_rows > 8
    for rows in (np.array([0, 1]), np.array([2, 3, 6, 7])):
        for part, whole in zip(loaded.once(rows), loaded.once(), strict=True):
            assert equal(part, {name: held[rows] for name, held in whole.items()})


def test_each_epoch_holds_every_row_once_in_another_order_and_batches_cross_its_end():
    loaded, *_ = make([10] * 7, length=10, batch_size=3, seed=3)  # 7 rows in batches of 3
    assert loaded.num_rows == 7 and [loaded.steps(epochs) for epochs in (0.1, 1, 2, 3)] == [1, 2, 5, 7]
    assert loaded.course(7) == {"steps": 7, "passes": 3.0}
    seen = rows_of([loaded.batch(step) for step in range(7)])["tokens"]  # three epochs
    epochs = [seen[7 * epoch : 7 * epoch + 7].tolist() for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != epochs[2]


def test_fewer_rows_than_a_batch_are_repeated():
    loaded, *_ = make([10] * 2, length=10, batch_size=5)
    assert (loaded.steps(1), loaded.steps(5), loaded.course(2)["passes"]) == (1, 2, 5.0)
    assert (loaded.batch(0)["segment_ids"] == 1).all()


def test_the_order_of_rows_is_the_same_for_ever():
    assert shuffled(8, seed=0, epoch=0).tolist() == [1, 4, 2, 6, 0, 7, 3, 5]
    assert np.array_equal(np.sort(shuffled(1000, 5, 2)), np.arange(1000))


def test_shuffles_are_uniform():
    first = np.bincount([shuffled(6, seed, epoch)[0] for seed in range(100) for epoch in range(60)], minlength=6)
    assert (abs(first - 1000) < 6 * math.sqrt(1000 * 5 / 6)).all()


def test_the_fingerprint_tells_tokens_masks_and_plan_apart():
    (loaded, tokens, trained, offsets) = make([5, 6, 3], length=8)
    same = {"tokenizer": None, "batch_size": 2}
    changed = tokens.copy()
    changed[3] += 1
    prints = {
        loaded.fingerprint,
        Data(changed, trained, offsets, length=8, **same).fingerprint,
        Data(tokens, ~trained, offsets, length=8, **same).fingerprint,
        Data(tokens, trained, offsets, length=9, **same).fingerprint,
        Data(tokens, trained, offsets, length=8, packing=False, **same).fingerprint,
        Data(tokens, trained, np.array([0, 5, 14]), length=8, **same).fingerprint,
    }
    assert len(prints) == 6
    assert Data(tokens, trained, offsets, length=8, **same).fingerprint == loaded.fingerprint


@pytest.mark.rule(7)
def test_overlong_pairs_are_dropped_or_truncated_and_counted():
    tok = tokenizer(adds_bos=False)
    rows = [{"prompt": "a" * 4, "completion": "b" * n} for n in (3, 5, 9)] + [{"prompt": "a" * 20, "completion": "b"}]
    sizes = {"length": 10, "batch_size": 1}
    assert len(tok("aaaabbb")["input_ids"]) == 7
    dropped = data.instruct(rows, tok, **sizes).report
    assert dropped["rows"] == 4 and dropped["documents"] == 2
    assert dropped["dropped"] == {"over length": {"rows": 2, "tokens": 14 + 22}}
    loaded = data.instruct(rows, tok, overlong="truncate", **sizes)
    assert loaded.report["truncated"] == {"rows": 1, "tokens": 4}
    assert loaded.report["dropped"] == {"answer beyond length": {"rows": 1, "tokens": 22}}
    assert loaded.report["documents"] == 3 and loaded.report["tokens"] == 8 + 10 + 10
    assert dropped["truncated"] == {"rows": 0, "tokens": 0}


def documents(loaded):
    """(ids, which of them count as targets) of each document."""
    bounds = zip(loaded.offsets[:-1], loaded.offsets[1:], strict=True)
    return [(loaded.tokens[a:b].tolist(), [False, *loaded.loss_mask[a : b - 1].tolist()]) for a, b in bounds]


def test_keep_end_keeps_the_end_of_the_answer_and_counts_what_it_cuts():
    tok = tokenizer(adds_bos=False)
    rows = [{"prompt": "a" * 4, "completion": "b" * n} for n in (3, 9)] + [{"prompt": "a" * 20, "completion": "b"}]
    a, b, end = (tok.convert_tokens_to_ids(token) for token in ("a", "b", "</s>"))
    loaded = data.instruct(rows, tok, overlong="keep_end", length=10, batch_size=1)
    assert [ids for ids, _ in documents(loaded)] == [
        [*[a] * 4, *[b] * 3, end], [*[b] * 9, end], [*[a] * 8, b, end]
    ]  # fmt: skip
    assert loaded.report["truncated"] == {"rows": 2, "tokens": 4 + 12} and not loaded.report["dropped"]
    # What a user says after the last answer goes first: it would push the answer out.
    turns = ["a" * 9, "bb", "a" * 99]
    chat = {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
    loaded = data.chat([chat], tok, template="openchat", overlong="keep_end", length=12, batch_size=1)
    ((ids, _),) = documents(loaded)
    assert tok.decode(ids).endswith("bb<|end_of_turn|>") and len(ids) == 12


def test_split_makes_several_documents_and_counts_the_pieces_in_which_nothing_trains():
    tok = tokenizer(adds_bos=False)
    a, b, end = (tok.convert_tokens_to_ids(token) for token in ("a", "b", "</s>"))
    rows = [{"prompt": "a" * 20, "completion": "b" * 12}, {"prompt": "a", "completion": "b"}]
    loaded = data.instruct(rows, tok, overlong="split", length=10, batch_size=1)
    # 33 tokens; each piece begins with the last token of the one before. The first two hold no answer.
    assert documents(loaded) == [
        ([*[a] * 2, *[b] * 8], [*[False] * 2, *[True] * 8]),
        ([*[b] * 5, end], [False, *[True] * 5]),
        ([a, b, end], [False, True, True]),
    ]
    assert loaded.report["split"] == {"rows": 1, "documents": 2, "tokens_left_out": 20}
    assert loaded.report["rows"] == 2 and not loaded.report["dropped"]


random_documents = st.lists(st.lists(st.booleans(), min_size=1, max_size=60), min_size=1, max_size=8)


@pytest.mark.rule(7)
@example([[False, True, False, False]], 3, "keep_end")  # what is left is shorter than the length
@given(random_documents, st.integers(2, 12), st.sampled_from(["drop", "truncate", "keep_end", "split"]))
@settings(max_examples=200, deadline=None)
def test_whatever_becomes_of_overlong_rows_nothing_is_lost_uncounted(masks, length, overlong):
    originals, start = [], 0
    for mask in masks:  # every token another one
        originals.append(Document(np.arange(start, start + len(mask), dtype=np.int32), np.array(mask)))
        start += len(mask)
    tally = Tally(length, overlong)
    ids, trained = np.arange(start, dtype=np.int32), np.concatenate(masks)
    offsets = np.cumsum([0, *map(len, masks)])
    slices = tally.fit(trained, offsets, np.arange(len(masks)), whole=True)
    kept = [Document(ids[first:last], trained[first:last]) for first, last in slices.tolist()]
    assert all(len(document.ids) <= length and document.trained[1:].any() for document in kept)
    targets = lambda found: np.sort(np.concatenate([d.ids[1:][d.trained[1:]] for d in found] or [[]])).tolist()  # noqa: E731
    report = tally.report()
    dropped = {why: count["rows"] for why, count in report["dropped"].items()}
    assert len(kept) == len(masks) - sum(dropped.values()) - report["split"]["rows"] + report["split"]["documents"]
    learnable = [d for d in originals if d.trained[1:].any()]
    assert dropped.get("no trained token", 0) == len(masks) - len(learnable)
    if overlong == "split":  # every target once, with the tokens between them
        assert targets(kept) == targets(originals)
        assert not report["truncated"]["rows"] and set(dropped) <= {"no trained token"}
    elif overlong == "keep_end":
        ends = {int(d.ids[d.trained][-1]) for d in learnable}
        assert ends == {int(d.ids[d.trained][-1]) for d in kept}
        assert report["truncated"]["rows"] == sum(len(d.ids) > length for d in learnable)
        assert sum(len(d.ids) for d in kept) + report["truncated"]["tokens"] == sum(len(d.ids) for d in learnable)
    elif overlong == "truncate":
        assert all(d.ids[0] in [o.ids[0] for o in learnable] for d in kept)
        lost = report["truncated"]["tokens"] + sum(count["tokens"] for count in report["dropped"].values())
        assert sum(len(d.ids) for d in kept) + lost == start
    else:
        assert dropped.get("over length", 0) == sum(len(d.ids) > length for d in learnable)


def test_raw_text_over_the_length_is_cut_and_never_dropped():
    report = data.text(["a" * 25, "b"], tokenizer(adds_bos=False), length=10, batch_size=1).report
    assert (report["tokens"], report["split_documents"], report["pieces"]) == (28, 1, 4)
    assert not report["dropped"]


def test_the_report_is_json_and_its_counts_add_up():
    rows = [{"instruction": "What is it?", "response": "The cat."}] * 9 + [{"instruction": "Hello", "response": ""}]
    loaded = data.instruct(rows, tokenizer(), template="chatml", length=64, batch_size=2)
    report = json.loads(json.dumps(loaded.report))
    batches = rows_of(loaded.once())
    assert report["tokens"] == (batches["segment_ids"] > 0).sum()
    assert report["loss_tokens"] == batches["loss_mask"].sum()
    assert report["rows"] == report["documents"] + sum(count["rows"] for count in report["dropped"].values())
    assert report["packed_rows"] == loaded.num_rows and report["fingerprint"] == loaded.fingerprint
    assert report["packing_efficiency"] == pytest.approx(report["tokens"] / (loaded.num_rows * 64), abs=1e-4)
