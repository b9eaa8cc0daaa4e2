"""Imports point one way: `cli -> run -> {train, generation, hf, lora} -> models -> sharding`; `data` is a leaf."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# part of the package -> the other parts that it may import
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "lock": {"errors"},
    "values": {"errors"},
    "sandbox": {"errors"},
    "data": {"errors", "files", "sandbox", "values"},
    "sharding": {"errors"},
    "models": {"sharding", "errors"},
    "cluster": {"errors", "files"},
    "process": {"errors"},
    "flops": {"models"},
    "hf": {"models", "sharding", "errors", "files", "values", "cluster", "data"},
    "lora": {"hf", "models", "sharding", "errors", "files", "values", "cluster", "sandbox"},
    "train": {"flops", "models", "process", "sharding", "errors", "files", "lock"},
    "generation": {"lora", "models", "sharding", "errors", "data"},
    "card": {"__init__", "config", "files"},
    "env": {"__init__"},
    "config": {"errors", "files", "sharding", "values"},
    "vocabulary": {"config", "errors", "hf", "lora", "models"},
    "build": {
        *("card", "config", "files", "train", "generation", "hf", "lora", "data", "models", "errors", "vocabulary"),
    },
    "plan": {"vocabulary", "build", "config", "data", "fleet", "flops", "train", "hf", "models", "sharding", "errors"},
    "advise": {"build", "config", "data", "errors", "flops", "hf", "models", "plan", "process", "train"},
    "resume": {"config", "data", "errors", "files", "hf", "train"},
    "fleet": {
        *("build", "cluster", "config", "errors", "files", "flops", "lock", "lora", "models", "process"),
        *("resume", "sharding", "train"),
    },
    "chat": {"build", "cluster", "data", "errors", "generation", "hf", "lora", "models", "sharding", "values"},
    "run": {
        "chat",
        "resume",
        "build",
        "config",
        "train",
        "generation",
        "hf",
        "lora",
        "data",
        "sharding",
        "errors",
        "files",
        "lock",
        "cluster",
        "process",
    },
    "compare": {
        *("__init__", "advise", "build", "config", "data", "errors", "files", "fleet", "generation", "hf", "lock"),
        *("models", "plan", "process", "report", "run", "sharding", "train"),
    },
    "report": {"errors", "files", "values"},
    "parity": set(),
    "verbs": {"cluster", "process"},
    "cli": {
        *(
            "advise",
            "chat",
            "run",
            "fleet",
            "plan",
            "compare",
            "report",
            "parity",
            "cluster",
            "config",
            "env",
            "errors",
            "process",
            "values",
            "verbs",
            "__init__",
        )
    },
    "__main__": {"cli"},
}
# files that know less than their room does
NARROWER = {
    "chat/prompts": {"data", "errors", "values"},
    "cluster/launch": {"errors"},
    "compare/intervals": set(),
    "config/checks": {"errors", "sharding", "values"},
    "generation/sampling": {"errors"},
    "generation/decoding": {"generation", "models", "sharding"},
    "generation/prompts": {"data", "models", "errors"},
}
NO_JAX = {
    "data",
    "sandbox",
    "values",
    "parity",
    "errors",
    "files",
    "lock",
    "config",
    "card",
    "report",
    "cli",
    "verbs",
    "__main__",
}
# foreign library -> the parts that may import it
FOREIGN = {
    "ml_collections": {
        *("config", "cli", "build", "plan", "resume", "run", "compare", "fleet", "advise", "vocabulary"),
    },
    "absl": {"cli", "verbs"},
    "jax": set(ALLOWED) - NO_JAX,
    "flax": set(ALLOWED) - NO_JAX,
    "json": set(ALLOWED) - {"models"},
    "pathlib": set(ALLOWED) - {"models"},
    "transformers": {"hf", "data", "sandbox"},
    "huggingface_hub": {"hf"},
    "matplotlib": {"report"},
    "torch": set(),
    "peft": set(),
    "trl": set(),
}
FILES = sorted((ROOT / "specjax").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT / "specjax").parts[0].removesuffix(".py")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """The dotted names that a file imports: `from a import b` gives a.b, which stands for a as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_part_of_the_package_is_under_this_test():
    assert {part(path) for path in FILES} - {"__init__"} == set(ALLOWED)
    assert all((ROOT / "specjax" / f"{name}.py").is_file() for name in NARROWER)
    assert {path.stem for path in CONFIGS} >= {"full", "sft", "lora", "demo", "demo_base"}


@pytest.mark.parametrize("path", [path for path in FILES if part(path) != "__init__"], ids=str)
def test_a_part_imports_only_what_lies_below_it(path):
    me = part(path)
    allowed = NARROWER.get(path.relative_to(ROOT / "specjax").with_suffix("").as_posix(), ALLOWED[me] | {me})
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "specjax":
            other = rest.partition(".")[0]
            other = other if other in ALLOWED else "__init__"
            assert other in allowed, f"{path} imports {name}"
        assert me in FOREIGN.get(top, {me}), f"{path} imports {name}"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_imports_specjax_config_alone(path):
    names = imported(path)
    assert names
    assert all(name.startswith("specjax.config.") for name in names), names


@pytest.mark.parametrize(
    "name",
    [
        "cli",
        "verbs",
        "config/__init__",
        "config/source",
        "config/checks",
        "chat/prompts",
        "errors",
        "process",
        "cluster/launch",
        "__init__",
        "__main__",
    ],
)
def test_what_runs_before_the_verb_is_known_imports_nothing_heavy(name):
    light = {"absl", "ml_collections", "specjax"}
    names = imported(ROOT / "specjax" / f"{name}.py", top_level_only=True)
    assert names
    for top in {name.partition(".")[0] for name in names} - light:
        assert top in sys.stdlib_module_names, top


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"specjax", "configs", "demo", "tests", "benchmarks"} | {path.stem for path in (ROOT / "tests").glob("*.py")}


def canonical(name: str) -> str:
    """A distribution's name without its version and extras, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def declared(*extras: str) -> set[str]:
    """The distributions that an installation with these extras asks for."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {canonical(entry) for entries in lists for entry in entries}


def used(*folders: str) -> dict[str, set[str]]:
    """Each foreign module that the folders' files import -> the distributions that bring it."""
    files = {folder: list((ROOT / folder).rglob("*.py")) for folder in folders}
    assert all(files.values())
    tops = {name.partition(".")[0] for paths in files.values() for path in paths for name in imported(path)}
    brought, foreign = packages_distributions(), tops - sys.stdlib_module_names - OURS
    return {top: {canonical(name) for name in brought.get(top, [top])} for top in foreign}


def test_what_the_package_imports_is_declared():
    undeclared = {
        top
        for top, names in used("specjax", "configs", "demo").items()
        if not names & declared("wandb", "real", "report")
    }
    assert undeclared == set()


def test_what_is_declared_is_imported():
    assert declared() - set().union(*used("specjax", "demo").values()) == set()


def test_what_the_tests_import_is_declared():
    undeclared = {top for top, names in used("tests").items() if not names & declared("test")}
    assert undeclared == set()


TESTS = sorted((ROOT / "tests").glob("*.py"))


def test_tests_import_no_tests():
    stems = {path.stem for path in TESTS if path.stem.startswith("test_")}
    assert len(stems) > 30 and len(TESTS) > len(stems)
    for path in TESTS:
        assert not {name.partition(".")[0] for name in imported(path)} & stems, path
