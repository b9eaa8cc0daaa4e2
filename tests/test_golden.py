"""Twenty steps of each method, as they were: a change of numbers that no other test names is seen here.

Where the change is meant: `JAX_PLATFORMS=cpu python tests/test_golden.py --regenerate`, and say why in the commit.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import data, metrics, model

import specjax as sj
from specjax.train.optim import schedule

FOLDER = Path(__file__).parent / "golden"
COMMAND = "JAX_PLATFORMS=cpu python tests/test_golden.py --regenerate"
METHODS = ("full", "sft", "lora")
STEPS = 20


def losses(method: str) -> list[float]:
    """The training losses of a small run: raw text or answers alone, every weight or LoRA's."""
    made = model()
    if method == "lora":
        sj.lora.inject(made, rank=4, alpha=16, dropout=0.1, targets="all-linear", seed=0)
    rows = data(answers=method != "full", seed=2)
    rate = schedule("cosine", learning_rate=1e-2, steps=STEPS, warmup_steps=3)
    with tempfile.TemporaryDirectory() as workdir:
        sj.fit(
            made,
            rows,
            sj.adamw(rate, weight_decay=0.1),
            steps=STEPS,
            trainable=sj.LORA if method == "lora" else sj.ALL,
            workdir=workdir,
            accumulate=2,
            log_every=1,
            tensorboard=False,
        )
        return [row["loss"] for row in metrics(workdir)]


@pytest.mark.rule(2)
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_of_the_golden_file(method):
    lines = (FOLDER / f"{method}.txt").read_text().splitlines()
    wanted = [float(line) for line in lines if not line.startswith("#")]
    assert len(wanted) == STEPS
    # Machines differ in the last bits, and twenty steps carry them on.
    np.testing.assert_allclose(losses(method), wanted, rtol=1e-5, err_msg=f"where this is meant: {COMMAND}")


def test_no_golden_file_is_left_over():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{method}.txt" for method in METHODS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit(f"to write {FOLDER} anew: {COMMAND}")
    FOLDER.mkdir(exist_ok=True)
    for name in METHODS:
        text = "\n".join(f"{loss:.7f}" for loss in losses(name))
        (FOLDER / f"{name}.txt").write_text(f"# The losses of steps 1 to {STEPS}; made by `{COMMAND}`.\n{text}\n")
