"""What signatures say of shapes and dtypes is checked in every test: conftest.py hooks the modules that say it."""

import ast
import importlib
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import data, model

from specjax.data.pack import best_fit
from specjax.models.grouped import grouped_matmul
from specjax.models.rope import Rope, tables
from specjax.train.objective import by_group

ROOT = Path(__file__).parent.parent
TOKENS = np.zeros((2, 5), np.int32)

WRONG = {
    "tokens of one axis": lambda: model()(TOKENS[0]),
    "tokens of another dtype": lambda: model()(TOKENS.astype(np.float32)),
    "positions of another length": lambda: model()(TOKENS, TOKENS[:, :3]),
    "hidden states of another width than the table": lambda: model().unembed(jnp.zeros((2, 8)), jnp.zeros((9, 3))),
    "positions that are no whole numbers": lambda: tables(jnp.zeros((2, 5)), Rope(8)),
    "sizes of more groups than there are": lambda: grouped_matmul(
        jnp.zeros((4, 3)), jnp.zeros((2, 6, 3)), jnp.zeros(3, jnp.int32)
    ),
    "rows that are numbers of another dtype": lambda: data().batch(0, np.zeros(1)),
    "sizes of two axes": lambda: best_fit(np.ones((2, 2), np.int64), 4),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=list(WRONG))
def test_a_wrong_shape_or_dtype_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(jnp, "sum", lambda values, axis: values)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        by_group(model(), jnp.ones((2, 5)))


def jaxtyping_names(path: Path) -> set[str]:
    """What a file imports of jaxtyping."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "jaxtyping" for alias in node.names}


def test_every_module_with_annotations_is_checked():
    annotated = {path: found for path in (ROOT / "specjax").rglob("*.py") if (found := jaxtyping_names(path))}
    assert len(annotated) > 15
    for path, found in annotated.items():
        # Dtypes alone: by themselves they check nothing, so that nothing is checked in a user's process.
        assert all(issubclass(getattr(jaxtyping, name), jaxtyping.AbstractDtype) for name in found), path
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert type(module.__spec__.loader).__module__ == "jaxtyping._import_hook", path
