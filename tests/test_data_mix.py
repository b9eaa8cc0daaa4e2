"""Several sources in one run: shares that are kept, each source's rows in passes of their own, their losses apart."""

import json

import jax
import numpy as np
import pytest
from data_fixtures import tokenizer
from helpers import data, metrics, model, on_device

import specjax as sj
from specjax import build
from specjax.config import get_config
from specjax.errors import UserError
from specjax.train.objective import SOURCE, by_source, next_token

NAMES = ("mine", "general", "code")


def parts(batch_size=8):
    """Rows of 64 tokens that are full, half full and in between."""
    sizes = ({"documents": 60}, {"documents": 40, "shortest": 33, "longest": 40}, {"documents": 7, "seed": 3})
    return [data(batch_size=batch_size, **size) for size in sizes]


def mixed(shares=(0.7, 0.2, 0.1), by="tokens"):
    return sj.data.mix(list(zip(parts(), shares, strict=True)), shares=by, names=NAMES)


@pytest.mark.parametrize("by", ["tokens", "rows"])
def test_shares_are_kept_and_each_source_goes_through_its_rows(by):
    made, steps = mixed((7, 2, 1), by), 200
    rows = np.concatenate([made.row_ids(step) for step in range(steps)])
    source = np.searchsorted(made._first, rows, side="right") - 1
    weight = made._sizes[rows] if by == "tokens" else np.ones(len(rows))
    found = np.bincount(source, weight) / weight.sum()
    np.testing.assert_allclose(found, [0.7, 0.2, 0.1], atol=0.004)
    # To within a row at any place, so that each batch has its part.
    for number in range(3):
        counts = np.cumsum(source == number)
        expected = counts[-1] / len(rows) * np.arange(1, len(rows) + 1)
        assert np.abs(counts - expected).max() < 2
        own = rows[source == number] - made._first[number]
        part = made.parts[number]
        assert own.tolist() == [part._row(place) for place in range(len(own))]
        assert made.course(steps)["passes_of"][NAMES[number]] == round(len(own) / part.num_rows, 2)
    assert made.course(steps)["passes"] == made.course(steps)["passes_of"]["mine"]
    assert made.course(made.steps(3))["passes"] == pytest.approx(3, abs=0.5)


def test_a_batch_is_a_pure_function_of_its_step_and_has_each_sources_rows():
    made, again = mixed(), mixed()
    for step in (41, 0, 7):
        batch, ids = again.batch(step), made.row_ids(step)
        for name, values in made.batch(step).items():
            assert np.array_equal(values, batch[name])
            assert np.array_equal(again.micro_batches(step, 2)[name][1], values[1::2])
        source = np.searchsorted(made._first, ids, side="right") - 1
        for row, (number, own) in enumerate(zip(source, ids - made._first[source], strict=True)):
            alone = made.parts[number]._assemble(np.array([own]))
            assert all(np.array_equal(batch[name][row], alone[name][0]) for name in alone)
            assert np.array_equal(batch[SOURCE][row], (alone["segment_ids"][0] > 0) * (number + 1.0))
        assert made.tokens_in(step) == (batch["segment_ids"] > 0).sum()
    assert made.fingerprint == again.fingerprint != mixed((0.6, 0.3, 0.1)).fingerprint


def test_a_pass_and_columns_go_through_all_parts():
    made = mixed()
    seen = np.concatenate([batch["tokens"] for batch in made.once()])[: made.num_rows]
    assert np.array_equal(made.per_token(seen), np.concatenate([part.tokens for part in made.parts]))
    wider = made.with_column("twice", 2.0 * made.per_token(seen))
    assert np.array_equal(wider.batch(3)["twice"], 2.0 * wider.batch(3)["tokens"])
    *_, last = made.once(np.array([6, 7]))  # as a process asks whose devices have the last rows
    assert last["tokens"].shape == (2, 64) and SOURCE in last
    with pytest.raises(UserError, match="column 'source'"):
        made.with_column(SOURCE, np.zeros(made.report["tokens"]))


def test_rows_are_shown_by_their_numbers_in_all_parts(monkeypatch):
    made = mixed()
    for number, part in enumerate(made.parts):
        monkeypatch.setattr(part, "preview", lambda which, number=number: [(number, row) for row in which])
    _, second, third, _ = made._first.tolist()
    assert made.preview([third + 1, second, 0, second - 1]) == [(2, 1), (1, 0), (0, 0), (0, second - 1)]


def test_the_report_counts_each_source():
    report = mixed().report
    assert [part["share"] for part in report["sources"].values()] == pytest.approx([0.7, 0.2, 0.1])
    for key in ("tokens", "loss_tokens", "documents", "packed_rows"):
        assert report[key] == sum(part[key] for part in report["sources"].values())
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shares": (1, 0, 1)}, "a share above 0"),
        ({"by": "row"}, "shares is 'row': use one of tokens, rows. Did you mean 'rows'"),
    ],
)
def test_what_is_no_mixture_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        mixed(**change)
    with pytest.raises(UserError, match=r"batch_size \[8, 4\]"):
        sj.data.mix([(parts()[0], 1), (parts(4)[0], 1)])


def test_the_loss_of_each_source_is_that_of_its_rows_alone():
    made, of = mixed((1, 1, 1)), model()
    batch = made.batch(0)
    scores = jax.jit(lambda batch: next_token(of, batch))
    whole, apart = scores(on_device(batch)), jax.jit(lambda b: by_source(next_token, NAMES)(of, b))(on_device(batch))
    assert {*apart} == {*whole} | {f"{kind}/{name}" for kind in ("loss", "share") for name in NAMES}
    number = batch[SOURCE].max(1)
    for place, name in enumerate(NAMES, 1):
        here = number == place
        assert 0 < here.sum() < 8
        nll, count = scores(on_device(batch | {"loss_mask": batch["loss_mask"] * here[:, None]}))["loss"]
        np.testing.assert_allclose(apart[f"loss/{name}"][0], nll, rtol=1e-5)
        assert (apart[f"loss/{name}"][1], apart[f"share/{name}"][0]) == (count, count)
    np.testing.assert_allclose(apart["loss"], whole["loss"], rtol=1e-6)
    assert by_source(next_token, ()) is next_token


def test_a_run_logs_the_loss_of_each_source_and_trains_as_without(tmp_path):
    """Its gradient is that of the whole: the parts are only told."""
    made = mixed()
    plain = mixed()
    plain.sources = ()
    lines = []
    for name, rows in (("apart", made), ("whole", plain)):
        folder = tmp_path / name
        sj.fit(model(), rows, sj.adamw(1e-2), steps=3, workdir=folder, log_every=1, accumulate=2, tensorboard=False)
        lines.append(metrics(folder))
    for apart, whole in zip(*lines, strict=True):
        assert {key: apart[key] for key in whole} == pytest.approx(whole, rel=1e-6)
        total = 0.0
        for name in NAMES:
            assert (f"loss/{name}" in apart) == (apart[f"share/{name}"] > 0)
            total += apart[f"share/{name}"] * apart.get(f"loss/{name}", 0.0)
        assert total == pytest.approx(apart["loss"], rel=1e-5)


def test_a_config_mixes_sources_of_several_kinds_in_one_line(tmp_path):
    pairs = [{"instruction": f"Say {n}", "response": f"It is {n}."} for n in range(40)]
    for name, rows in (("mine", pairs), ("general", [{"text": f"The cat sat on {n}."} for n in range(30)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = get_config()
    config.data.train = [(f"{tmp_path}/mine.jsonl", 0.8), (f"{tmp_path}/general.jsonl", 0.2)]
    config.data.template, config.data.length, config.data.cache = "chatml", 64, "off"
    config.data.eval_fraction, config.batch_size = 0.1, 4
    train, sets = build.data_of(config, tokenizer())
    assert train.sources == ("mine", "general")
    assert [part["format"] for part in train.report["sources"].values()] == ["instruct", "text"]
    assert {name: rows.report["rows"] for name, rows in sets.items()} == {"heldout-mine": 4, "heldout-general": 3}
    assert train.fingerprint == build.train_data_of(config, tokenizer()).fingerprint
