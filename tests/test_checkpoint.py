"""What a checkpoint holds on disk: any pytree, what 0.1 wrote, and what is said where it does not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from damages import damages, outcome, written
from helpers import assert_same_bits, data, model, weights

import specjax as sj
from specjax.errors import UserError
from specjax.train import checkpoint, checksums
from specjax.train.checkpoint import Checkpoints, Damaged

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    trainable: dict
    opt_state: object
    step: jax.Array


def params(seed=0):
    """Names that a file system or a dotted path would take for something else, numbers, and one array of each width."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        ("layers", 0, "q_proj", "lora", "v1.2", "a"): jnp.asarray(draw((3, 4)), jnp.float32),
        ("layers", 0, "q_proj", "lora", "v1", "2", "a"): jnp.asarray(draw((3, 4)), jnp.float32),
        ("layers", 0, "q_proj", "lora", "a/b %2E", "a"): jnp.asarray(draw((2,)), jnp.bfloat16),
        ("layers", 0, "kernel"): jnp.asarray(draw((5,)), jnp.float32),
        ("layers", 1, "kernel"): jnp.asarray(draw((6,)), jnp.float32),
    }


def state(seed=0):
    made = params(seed)
    return State(made, optax.adam(1e-3).init(made), jnp.asarray(7, jnp.int32))


def saved(folder, tree, step=1, **options):
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, tree, {"step": step}, **options)
    checkpoints.close()
    return Checkpoints(folder, read_only=True)


def test_a_tree_of_any_kind_comes_back_bit_for_bit(tmp_path):
    tree = state()
    found = saved(tmp_path, tree).load(1, jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.rule(4)
def test_what_trains_is_read_alone(tmp_path):
    tree = state()
    found = saved(tmp_path, tree).load(1, {"trainable": params(seed=1)})
    assert found.keys() == {"trainable"}
    for path, value in tree.trainable.items():
        np.testing.assert_array_equal(np.asarray(found["trainable"][path]), np.asarray(value), err_msg=str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made | {("norm",): jnp.ones(3)}, "it has no trainable.norm"),
        (lambda made: dict(list(made.items())[:-1]), "it has trainable.layers.1.kernel too"),
        (
            lambda made: made | {("layers", 1, "kernel"): jnp.ones((2, 3))},
            r"trainable.layers.1.kernel is \[6\] there and \[2, 3\] here",
        ),
    ],
)
def test_another_models_checkpoint_is_refused_by_what_differs(tmp_path, change, said):
    with pytest.raises(UserError, match=f"1: does not fit this model and optimizer .{said}.: go on with"):
        saved(tmp_path, state()).load(1, {"trainable": change(params())})


def test_of_equally_good_checkpoints_the_last_is_best_and_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, None)):
        checkpoints.save(step, state(), {}, loss)
    checkpoints.close()
    for read in (checkpoints, Checkpoints(tmp_path, read_only=True)):
        assert (read.best(), read.latest()) == (3, 5)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["3", "5"]


def test_reading_writes_nothing(tmp_path):
    saved(tmp_path / "run", state())
    half = tmp_path / "run" / "2.orbax-checkpoint-tmp"  # another process may be writing it
    half.mkdir()
    before = sorted(tmp_path.rglob("*"))
    read = Checkpoints(tmp_path / "run", read_only=True)
    assert (read.pick("last"), read.meta(1)) == (1, {"step": 1})
    read.load(1, state())
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="holds no checkpoints"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def written_by_0_1(folder, tree):
    """A checkpoint of specjax 0.1: Orbax's v0 API, an item a part, parameters by dotted path, layers in one segment."""

    def name(path):
        return ".".join(str(part) for part in path if part != 0)

    def dotted(part):
        return jax.tree.map(
            lambda leaf: {name(path): value for path, value in leaf.items()} if isinstance(leaf, dict) else leaf,
            part,
            is_leaf=lambda leaf: isinstance(leaf, dict),
        )

    with v0.CheckpointManager(folder) as manager:
        items = {name: v0.args.StandardSave(dotted(part)) for name, part in tree.items()}
        manager.save(6, args=v0.args.Composite(**items, meta=v0.args.JsonSave({"best": None, "bad": 0})))


def test_what_0_1_wrote_is_read(tmp_path):
    tree = {"trainable": params(), "opt_state": optax.adam(1e-3).init(params())}
    tree["trainable"].pop(("layers", 0, "q_proj", "lora", "v1.2", "a"))  # 0.1 could not save it
    tree["opt_state"] = optax.adam(1e-3).init(tree["trainable"])
    written_by_0_1(tmp_path, tree)
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest(), checkpoints.meta(6)) == (6, {"best": None, "bad": 0})
    found = checkpoints.load(6, jax.tree.map(jnp.zeros_like, tree))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    weights = checkpoints.load(6, {"trainable": tree["trainable"]})
    assert weights["trainable"].keys() == tree["trainable"].keys()
    # The next checkpoint is one of today, and takes the old one's place.
    checkpoints.save(7, found, {})
    checkpoints.close()
    assert [folder.name for folder in tmp_path.iterdir()] == ["7"]


def test_what_0_1_wrote_and_does_not_fit_is_refused_by_its_age(tmp_path):
    written_by_0_1(tmp_path, {"trainable": params(), "opt_state": [jnp.ones(1)]})
    said = r"6: was written by specjax 0.1 and does not fit this model .*\(it has no .*, or start in a new workdir"
    with pytest.raises(UserError, match=said):
        Checkpoints(tmp_path).load(6, {"trainable": {("norm",): jnp.ones(3)}})


FIT = """
import sys
sys.path.insert(0, "tests")
import specjax as sj
from helpers import data, model
rows = {"heldout": data(seed=1, documents=6)}
options = {"eval_data": rows, "eval_every": 4, "save_every": 3, "tensorboard": False, "workdir": sys.argv[1]}
for steps in (6, 9):
    sj.fit(model(), data(), sj.adamw(1e-3), steps=steps, **options)
"""


def test_a_fit_from_python_says_nothing_on_stderr(tmp_path):
    """Neither does its resuming: the libraries' remarks are no matter of the user's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", FIT, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == 9


DAMAGE = {
    "metrics that are no JSON": ("metrics/metrics", b"{"),
    "no meta": ("meta/data.json", None),
    "a meta cut short": ("meta/data.json", b'{"st'),
    "an overwritten tree": ("state/_METADATA", b"\0" * 600),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_makes_way_for_the_one_before_it(tmp_path, case):
    name, content = DAMAGE[case]
    saved(tmp_path / "checkpoints", {"trainable": params()}, step=3, loss=0.5)
    saved(tmp_path / "checkpoints", {"trainable": params(seed=1)}, step=6, loss=0.9)
    file = tmp_path / "checkpoints" / "6" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Damaged, match=r"checkpoints/6 is damaged .*: take it away to use that of step 3\.$"):
        found = Checkpoints(tmp_path / "checkpoints", read_only=True)
        assert found.meta(6) and found.load(6, {"trainable": params()})
    with pytest.warns(UserWarning, match=r"checkpoints/6 is damaged .* goes on from the checkpoint of step 3\.$"):
        found = Checkpoints(tmp_path / "checkpoints")
        if found.latest() == 6:  # else it was moved when the folder was opened
            with pytest.raises(Damaged) as raised:
                assert found.meta(6) and found.load(6, {"trainable": params()})
            found.set_aside(6, raised.value)
    assert found.latest() == 3 and (tmp_path / "damaged" / "6").is_dir()
    (tmp_path / "checkpoints" / "3" / "meta" / "data.json").unlink()
    with pytest.raises(Damaged, match=r"start in a new workdir\.$") as raised:
        found.meta(3)
    with pytest.raises(Damaged):
        found.set_aside(3, raised.value)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    def run():
        trained = model()
        sj.fit(trained, data(), sj.adamw(1e-2), steps=1, workdir=tmp_path / "run", tensorboard=False)
        return weights(trained)

    wanted, first = run(), tmp_path / "run" / "checkpoints" / "1"
    shutil.copytree(first, first.with_name("2"))
    (first.with_name("2") / "state" / "_METADATA").write_bytes(b"")
    with pytest.warns(UserWarning, match="goes on from the checkpoint of step 1"):
        assert_same_bits(run(), wanted)
    assert (tmp_path / "run" / "damaged" / "2").is_dir()


@pytest.mark.parametrize(("steps", "ends"), [((3, 6), "the one before, said"), ((6,), "one sentence")])
def test_no_damage_of_any_file_of_the_newest_checkpoint_is_silent(tmp_path, steps, ends):
    """A few kinds of damage; tests/damages.py as a program does all."""
    wanted = written(tmp_path, steps)
    like = jax.tree.map(jnp.zeros_like, wanted[6][1])
    checkpoint = tmp_path / "checkpoints" / "6"
    kinds = (": a bit at 0", "state: removed", "the folder: empty") if len(steps) == 2 else (": a block at 0",)
    found = {
        what: outcome(tmp_path, damage, wanted, like) for what, damage in damages(checkpoint, 0) if what.endswith(kinds)
    }
    assert len(found) >= sum(file.is_file() for file in checkpoint.rglob("*"))
    last = ("commit_success.txt", "_CHECKPOINT_METADATA: a bit")  # read by nobody; the time may be another
    assert {what: end for what, end in found.items() if end != ends and not what.startswith(last)} == {}
    assert {end for what, end in found.items() if what.startswith(last)} <= {"without effect", ends}


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path):
    wanted = written(tmp_path, (6,))[6][1]
    (tmp_path / "checkpoints" / "6" / checksums.NAME).unlink()
    about = tmp_path / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    about.write_text(about.read_text().replace('{"checksums": "SHA256SUMS"}', "{}"))
    found = Checkpoints(tmp_path / "checkpoints").load(6, jax.tree.map(jnp.zeros_like, wanted))
    assert_same_bits(
        *({str(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (found, wanted))
    )


def test_a_process_whose_save_failed_waits_for_no_other(monkeypatch):
    """Orbax would, for 20 minutes, in a `finally`; with real processes: torture.py processes."""
    waited = []
    monkeypatch.setattr(checkpoint.multihost, "get_barrier_sync_fn", lambda: lambda **how: waited.append(how))
    meet = checkpoint._Async().v0().barrier_sync_fn
    meet(key="a", timeout_ms=1)
    assert waited == [{"key": "a", "timeout_ms": 1}]

    def save():
        try:
            raise OSError(28, "No space left on device")
        finally:
            meet(key="b", timeout_ms=1)

    with pytest.raises(OSError, match="No space left"):
        save()
    assert len(waited) == 1
