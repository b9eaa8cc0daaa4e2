"""Properties that hold of any input: packer, masks, the endless sequence of rows, names, values; and a short fuzz."""

import os

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.data.loader import Data
from specjax.data.pack import plan
from specjax.files import is_inside
from specjax.hf import names
from specjax.models import ModelConfig, Segment
from specjax.models.rope import Rope
from specjax.values import shown

bounded = settings(max_examples=40, derandomize=True, deadline=None, database=None)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=40)
LENGTH = st.integers(2, 32)


@bounded
@given(SIZES, LENGTH, st.booleans())
def test_every_token_lies_in_one_row_which_is_no_longer_than_it_may_be(sizes, length, packing):
    offsets = np.cumsum([0, *sizes])
    starts, pieces, rows = plan(offsets, length, packing)
    assert sorted(at for start, size in zip(starts, pieces, strict=True) for at in range(start, start + size)) == list(
        range(offsets[-1])
    )
    assert rows[0] == 0 and rows[-1] == len(pieces) and (np.diff(rows) >= 1).all()
    full = np.add.reduceat(pieces, rows[:-1])
    assert full.max() <= length
    document = np.searchsorted(offsets, starts, "right")
    assert (starts + pieces <= offsets[document]).all()  # no piece spans two
    if packing:  # best-fit decreasing (Johnson 1974), against the least that any packing needs
        assert len(full) <= 11 / 9 * np.ceil(offsets[-1] / length) + 6 or (2 * full > length).sum() >= len(full) - 1
    else:
        assert (np.diff(rows) == 1).all()


@bounded
@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.integers(16, 24))
def test_pairs_lie_side_by_side(sizes, length):
    offsets = np.cumsum([0, *sizes, *sizes])
    starts, _, rows = plan(offsets, length, together=2)
    number = np.searchsorted(offsets, starts, "right") - 1
    for first, last in zip(rows[:-1], rows[1:], strict=True):
        held = number[first:last]
        assert (held[::2] % 2 == 0).all() and (held[1::2] == held[::2] + 1).all()


def data(sizes, length, batch_size, seed, trains) -> Data:
    offsets = np.cumsum([0, *sizes])
    trained = np.resize(np.array(trains, bool), offsets[-1])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Data(tokens, trained, offsets, tokenizer=None, length=length, batch_size=batch_size, seed=seed)


@bounded
@given(SIZES, LENGTH, st.integers(1, 5), st.lists(st.booleans(), min_size=1, max_size=9))
def test_each_trained_token_is_a_target_once_but_for_a_documents_first(sizes, length, batch_size, trains):
    made = data(sizes, length, batch_size, 0, trains)
    offsets = made.offsets
    wanted = made._trained.copy()
    wanted[offsets[:-1]] = False
    seen: list[int] = []
    for batch in made.once():
        mask = batch["loss_mask"] > 0
        assert (batch["targets"][mask] == batch["tokens"][mask] + 1).all()  # the next token, of the same document
        assert not (mask & (batch["segment_ids"] == 0)).any()
        seen += batch["targets"][mask].tolist()
    assert sorted(seen) == (np.flatnonzero(wanted) + 1).tolist()


@pytest.mark.rule(6)
@bounded
@given(SIZES, LENGTH, st.integers(1, 6), st.integers(0, 2**63 - 2), st.integers(0, 50), st.integers(1, 6))
def test_a_run_that_goes_on_anywhere_sees_the_same_rows_and_each_once_a_pass(sizes, length, batch, seed, step, micro):
    made, again = (data(sizes, length, batch * micro, seed, [True]) for _ in range(2))
    whole = np.concatenate([made.row_ids(s) for s in range(step + 1)])
    assert np.array_equal(again.row_ids(step), whole[step * batch * micro :])  # asked for alone
    for start in range(0, len(whole) - made.num_rows + 1, made.num_rows):
        assert sorted(whole[start : start + made.num_rows]) == list(range(made.num_rows))
    cut = made.micro_batches(step, micro)
    for name, values in made.batch(step).items():
        assert np.array_equal(cut[name].swapaxes(0, 1).reshape(values.shape), values)


@pytest.mark.rule(1)
@bounded
@given(
    st.sampled_from(sorted(names.TABLES)),
    st.lists(st.tuples(st.sampled_from(["dense", "experts"]), st.integers(1, 3)), min_size=1, max_size=3),
    st.tuples(*(st.integers(1, 3) for _ in range(3))),
)
def test_tensors_names_are_different_and_a_tensor_comes_back_from_ours(family, runs, shape):
    sizes = dict(vocab_size=8, embed_dim=4, mlp_dim=4, num_heads=1, num_kv_heads=1, head_dim=2, max_positions=8)
    config = ModelConfig(
        family, segments=tuple(Segment(*run) for run in runs), norm_eps=1e-5, ropes=(Rope(2),), query_scale=1.0, **sizes
    )
    paths = []
    for ours, _, _ in names.TABLES[family]:
        parts = tuple(ours.split("."))
        layered = parts[0] == "layers"
        paths += [("layers", number, *parts[1:]) for number in range(len(runs))] if layered else [parts]
    found = []
    for entry in names.entries(config, paths):
        leads = (runs[int(entry.path[1])][1], 2)[: entry.stacked] if entry.stacked else ()
        inner = {"table": shape[:2], "pairs": (*shape[:2], 2)}.get(entry.kind, shape)
        whole = (*leads, *inner)
        found += [name for _, name in entry.tensors(whole)]
        ours = np.arange(np.prod(inner)).reshape(inner)
        there = names.to_hf(ours, entry.kind)
        assert there.shape == entry.hf_shape(whole)
        assert np.array_equal(names.view(np.ascontiguousarray(there), inner), ours)
    assert len(found) == len(set(found))


PIECES = st.lists(st.sampled_from(["..", ".", "", "a", "b.c", "~", " ", "\0", "\\", "..a", "a/..", "é"]), max_size=6)


@bounded
@given(PIECES)
def test_no_name_that_is_let_in_leads_out(pieces):
    name = "/".join(pieces)
    there = os.path.normpath(os.path.join("/folder", name))
    if is_inside(name):
        assert there.startswith("/folder/") and there == f"/folder/{name}"
    elif "\0" not in name and "\\" not in name:
        assert there != f"/folder/{name}"


@bounded
@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_value_in_a_sentence_is_short(value):
    assert len(shown(value)) <= 120 and "\n" not in shown(value)


@pytest.mark.parametrize("reader", sorted(set(fuzz.READERS) - {"template"}))
def test_a_short_fuzz(reader, tmp_path):
    executions = 40 if reader == "adapter" else 150  # each walks through a model
    found = fuzz.run(reader, tmp_path, executions=executions, seed=0)
    assert found.failures == [] and found.executions == executions and found.lines > 10
