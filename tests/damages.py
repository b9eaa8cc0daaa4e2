"""Single damages of a checkpoint's files, and what a restore makes of each; as a program: all, `damages.py SEEDS`."""

import collections
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np

from specjax.errors import UserError
from specjax.train.checkpoint import Checkpoints, Damaged


def damages(folder, seeds=1):
    """(what, function that does it) for every file of a folder, and for the folder itself."""

    def rewritten(name, change):
        def do(folder):
            path = folder / name
            path.write_bytes(bytes(change(bytearray(path.read_bytes()))))

        return do

    def flip(place, bit):
        def change(content):
            content[place] ^= 1 << bit
            return content

        return change

    def zero(place):
        def change(content):
            content[place : place + 512] = bytes(len(content[place : place + 512]))
            return content

        return change

    for file in sorted(folder.rglob("*")):
        name, rng = file.relative_to(folder), np.random.default_rng(len(str(file.relative_to(folder))))
        if file.is_dir():
            yield f"{name}: removed", lambda folder, name=name: shutil.rmtree(folder / name)
            continue
        size = file.stat().st_size
        places = {0, size // 2, size - 1, *rng.integers(size, size=seeds).tolist()}
        yield f"{name}: removed", lambda folder, name=name: (folder / name).unlink()
        yield f"{name}: empty", rewritten(name, lambda content: b"")
        yield f"{name}: half", rewritten(name, lambda content: content[: len(content) // 2])
        yield f"{name}: longer", rewritten(name, lambda content: content + b"0")
        yield f"{name}: all NUL", rewritten(name, lambda content: bytes(len(content)))
        yield f"{name}: all noise", rewritten(name, lambda content, rng=rng: rng.bytes(len(content)))
        yield f"{name}: the newline's kind", rewritten(name, lambda content: content.replace(b"\n", b"\r\n") + b"\n")
        for place in sorted(places):
            yield f"{name}: a bit at {place}", rewritten(name, flip(place, int(rng.integers(8))))
            yield f"{name}: a block at {place}", rewritten(name, zero(place))
    yield "the folder: empty", lambda folder: [shutil.rmtree(folder), folder.mkdir()]
    yield "the folder: a file more", lambda folder: (folder / "state" / "more").write_bytes(b"x")


def restored(workdir, like):
    """(step, meta, state) as a run restores them, and what it warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpoints = Checkpoints(workdir / "checkpoints")
        while (step := checkpoints.latest()) is not None:
            try:
                found = step, checkpoints.meta(step), checkpoints.load(step, like)
                break
            except Damaged as damaged:
                checkpoints.set_aside(step, damaged)
        checkpoints.close()
    return found, " ".join(str(one.message) for one in said)


def outcome(workdir, damage, wanted, like):
    """What a damage to the newest checkpoint of a copy of a run leads to, in a word or two.

    Args:
      workdir: of a run with the checkpoints `wanted`; left as it is.
      damage: of a folder.
      wanted: step -> (meta, state).
      like: abstract state.
    """
    with tempfile.TemporaryDirectory() as copy:
        copied = Path(copy) / "run"
        shutil.copytree(workdir, copied)
        damage(copied / "checkpoints" / str(max(wanted)))
        try:
            (step, meta, state), said = restored(copied, like)
        except UserError as error:
            return "one sentence" if "is damaged" in str(error) and str(error).count("\n") == 0 else f"said {error}"
        except Exception as error:
            return f"TRACEBACK {type(error).__name__}: {error}"
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, wanted[step][1])
        if not all(jax.tree.leaves(same)) or meta != wanted[step][0]:
            return "SILENT: other numbers"
        if step == max(wanted):
            return "without effect" if not said else f"SAID {said}"
        return "the one before, said" if "is damaged" in said and "goes on from" in said else "SILENT: the one before"


def written(workdir, steps=(3, 6)):
    """A run's checkpoints, each evaluated: step -> (meta, state)."""
    made = {step: ({"step": step, "tokens": 7}, state(step)) for step in steps}
    checkpoints = Checkpoints(workdir / "checkpoints", keep=len(steps))
    for step, (meta, tree) in made.items():
        checkpoints.save(step, tree, meta, 1.0 / step)
    checkpoints.close()
    return made


def state(seed):
    """Arrays of a few sizes, most of which no compression makes smaller."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        "trainable": {("layers", 0, "kernel"): jax.numpy.asarray(draw((40, 50)), "float32")},
        "opt_state": {"mu": jax.numpy.asarray(draw((40, 50)), "float32"), "count": jax.numpy.int32(seed)},
    }


if __name__ == "__main__":
    seeds, counts = int(sys.argv[1]), {}
    for steps in ((3, 6), (6,)):
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder)
            wanted = written(workdir, steps)
            like = jax.tree.map(jax.numpy.zeros_like, wanted[6][1])
            counts[steps] = collections.Counter()
            for what, damage in damages(workdir / "checkpoints" / "6", seeds):
                found = outcome(workdir, damage, wanted, like)
                counts[steps][found.split(":")[0]] += 1
                if found.split()[0] in ("SILENT:", "TRACEBACK", "SAID", "said") or found == "without effect":
                    print(f"{steps} {what}: {found}", flush=True)
    for steps, count in counts.items():
        print(f"{sum(count.values())} single damages of the newest of the checkpoints {steps}: {dict(count)}")
    bad = {word for count in counts.values() for word in count} - {
        "one sentence",
        "the one before, said",
        "without effect",
    }
    sys.exit(bool(bad))
