"""What the documents say can be done, can be done: commands parse, files exist, keys and functions are there."""

import ast
import importlib
import inspect
import os
import re
import shlex
from pathlib import Path

import links
import pytest

from specjax.cli import parse
from specjax.config import check_length, get_config, lora_settings, settled, validate
from specjax.config.checks import FREE, NESTED, flat
from specjax.config.entries import methods
from specjax.config.source import load_config_file
from specjax.verbs import VERBS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SKILL.md", "llms.txt")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ROOT / "docs" / "developers" / "files.md"
GROUPS = "dpo|model|lora|data|optimizer|eval|checkpoint|log|mesh"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A Markdown text without its fenced blocks, on one line."""
    return " ".join(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).split())


def commands(path: Path) -> list[list[str]]:
    """Every `specjax VERB --FLAG ...` in a document's blocks and code spans, or in a config's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        parts = [ast.get_docstring(ast.parse(text)) or ""]
    else:
        parts = [*blocks(text), *re.findall(r"`(specjax [^`]* --[^`]*)`", prose(text))]
    lines = re.sub(r"\\\n\s*", "", "\n".join(parts)).splitlines()
    found = [re.match(r"\s*specjax ([a-z].*)", line) for line in lines]
    return [shlex.split(hit[1], comments=True) for hit in found if hit]


def all_commands() -> list[tuple[str, list[str]]]:
    return [(name(path), words) for path in [*DOCUMENTS, *CONFIGS] for words in commands(path)]


def tree() -> list[str]:
    """The paths of the documentation's file tree."""
    block = next(block for block in blocks(FILES.read_text(encoding="utf-8")) if block.startswith("specjax/\n"))
    found: list[str] = []
    parents: list[str] = []
    for line in block.splitlines():
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [entry]
        found.append("".join(parents))
    return found


def test_what_these_tests_go_through_is_there():
    assert {"full.py", "sft.py", "lora.py"} <= {path.name for path in CONFIGS}
    assert {"architecture.md", "measurements.md", "parity.md"} <= {path.name for path in DOCUMENTS}
    assert "quickstart.ipynb" in {path.name for path in NOTEBOOKS} and len(NOTEBOOKS) > 3


def test_the_readme_is_a_page_and_shows_the_first_commands():
    assert len(README.splitlines()) <= 150
    assert {"data", "train", "generate", "export"} <= {words[0] for words in commands(ROOT / "README.md")}
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", README, re.MULTILINE))


def test_there_are_commands_of_every_verb_in_the_documents_and_in_every_config():
    where = [path for path, _ in all_commands()]
    assert len([path for path in where if path.endswith(".md")]) > 25
    assert {name(path) for path in CONFIGS} - set(where) == {"configs/demo_base.py"}  # its command is `make demo-base`
    assert {words[0] for path, words in all_commands() if path.endswith(".md")} == set(VERBS)


@pytest.mark.parametrize("path, words", all_commands())
def test_every_command_in_the_documents_parses_and_its_config_is_valid(monkeypatch, path, words):
    monkeypatch.chdir(ROOT)
    verb, *argv = ["--config=configs/demo.py" if word == "--config=F" else word for word in words]
    found = parse(verb, argv)
    if "config" in found:
        # What is launched runs on devices that are elsewhere.
        validate(found["config"], None if verb == "launch" else 1)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_verb_in_the_documents_exists(path):
    assert set(re.findall(r"`specjax ([a-z]+)", prose(path.read_text(encoding="utf-8")))) <= {*VERBS, "help"}


def test_every_make_target_in_the_documents_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named >= {"check", "demo", "test"}
    assert named <= set(targets)


def test_everything_in_the_file_tree_exists_and_all_of_the_package_is_in_it():
    paths = tree()
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []
    package = {name(path) for path in (ROOT / "specjax").rglob("*.py")}
    package -= {path for path in package if path.endswith("/__init__.py") and path != "specjax/__init__.py"}
    assert package | {name(path) for path in CONFIGS} <= set(paths)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_to_files_and_headings_resolve(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target


def test_links_that_lead_outside_have_the_form_of_their_host():
    """They are opened by `make links`, where there is a network."""
    found = links.outside()
    assert len(found) > 60 and any("arxiv" in link for link in found)
    assert {link: (said, found[link]) for link in found if (said := links.wrong(link))} == {}


@pytest.mark.parametrize(
    "link",
    [
        "http://arxiv.org/abs/2405.09673",
        "https://arxiv.org/abs/2405.967",
        "https://arxiv.org/2405.09673",
        "https://github.com/peft",
        "https://github.com/huggingface/peft/main/README.md",
        "https://huggingface.co/blob/main/README.md",
        "https://huggingface.co/datasets/one",
        "https://me:word@github.com/huggingface/peft",
        "https://host/x",
    ],
)
def test_a_link_of_another_form_is_found(link):
    assert links.wrong(link)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_and_tests_named_in_code_spans_exist(path):
    text = path.read_text(encoding="utf-8")
    roots = "specjax|configs|demo|docs|tests|benchmarks|notebooks"
    for span in re.findall(rf"`((?:{roots})/[\w./-]+)(?:::(\w+))?`", text):
        file, test = span
        assert (ROOT / file).exists(), span
        if test:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), span


def test_config_keys_named_in_the_documents_exist():
    config = get_config()
    apart = {"CHANGELOG.md", "log.md", "architecture.md", "glossary.md"}  # of the past; of tensors' names
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name not in apart]
    keys = [key for text in texts for key in re.findall(rf"`(?:--config\.)?((?:{GROUPS})\.[a-z_0-9.]+)", text)]
    assert len(keys) > 60
    for key in keys:
        if key.rpartition(".")[2] in ("py", "json", "md") or key.startswith(("data.eval.", "data.columns.")):
            continue  # a file, or a group whose names are the user's own
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """The calls of `sj.<name>` or `sj.<module>.<name>` in a piece of Python."""
    found = [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(text.removeprefix("sj."), node) for text, node in found if text.startswith("sj.")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_the_documents_python_calls_functions_that_exist_with_arguments_that_they_take(path):
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        for dotted, call in calls(ast.parse(block)):
            function = importlib.import_module("specjax")
            for part in dotted.split("."):
                function = getattr(function, part)
            keywords = {str(keyword.arg): None for keyword in call.keywords}
            inspect.signature(function).bind(*call.args, **keywords)


def test_the_readmes_python_shows_the_contract():
    found = {dotted for block in blocks(README, "python") for dotted, _ in calls(ast.parse(block))}
    contract = {"make_mesh", "load", "lora.inject", "data.instruct", "fit", "adamw", "generate", "lora.save", "export"}
    assert contract <= found


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_builds_its_model_abstractly_and_lays_it_over_a_mesh(path, monkeypatch):
    from specjax import sharding
    from specjax.hf.config import from_folder
    from specjax.hf.load import abstract
    from specjax.lora.targets import match

    monkeypatch.chdir(ROOT)
    config = load_config_file(str(path))
    for made in methods(config).values() if config.compare else [config]:
        devices = 8
        if path.stem == "demo_real":  # its base is downloaded first (tests/test_real.py), its batch has four rows
            made.model.path, devices = "demo/base", 4
        validate(made, devices)
        assert os.path.isfile(f"{made.model.path}/config.json"), "a shipped config runs on what ships with it"
        made = settled(made, "cpu", devices)
        sizes = from_folder(made.model.path)
        check_length(made.data.length, sizes.max_positions)
        param_dtype = "float32" if made.trainable == "all" else made.model.dtype
        model = abstract(sizes, dtype=made.model.dtype, param_dtype=param_dtype, remat=made.model.remat)
        assert sharding.of_module(model, sharding.make_mesh(fsdp=4, tensor=2))
        if made.trainable == "lora":
            assert match(model, lora_settings(made)["targets"])


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGS, *NOTEBOOKS], ids=name)
def test_no_figure_is_owed(path):
    marker = "MEASURED" + ":"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if marker in line] == []


def test_every_public_name_is_in_the_reference_of_the_api():
    import specjax
    from specjax import data, fleet, lora, plan

    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    written = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    found = []
    for dotted in written:
        module, _, attribute = dotted.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))
    public = {**{name: specjax for name in specjax.__all__}, **dict.fromkeys(("data", "fleet", "lora", "__version__"))}
    wanted = [getattr(home, name) for name, home in public.items() if home]
    wanted += [getattr(room, name) for room in (data, fleet, lora) for name in room.__all__] + [plan.plan]
    assert [each for each in wanted if not any(each is shown for shown in found)] == []


def test_the_pages_that_are_made_have_every_verb_and_every_key(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = importlib.import_module("pages")
    command_line, config = pages.command_line(), pages.config_keys()
    assert [verb for verb in VERBS if f"\n## specjax {verb}\n" not in command_line] == []
    groups = {*NESTED, *FREE}
    keys = {key for key, _ in flat(get_config().to_dict())} | groups
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", config, re.MULTILINE)) == sorted(keys)
    for made in (pages.landing(), pages.agents().replace(".html", ".md")):
        links = re.findall(r"\]\(([^)#]+)", made)
        assert links and all(re.match("https?:", link) or (ROOT / "docs" / link).exists() for link in links)


def test_every_rule_of_numerics_has_a_test_and_every_mark_a_rule(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = importlib.import_module("pages")
    text = (ROOT / "docs" / pages.RULES).read_text(encoding="utf-8")
    made = pages.rules(text)
    assert re.search(r"^\| Micro batches add up to the whole batch \| `tests/test_step.py` \|$", made, re.MULTILINE)
    for wrong in (text + "\n## 99. Nobody holds this\n", text.replace("## 8. ", "## 98. ")):
        with pytest.raises(ValueError, match=r"has the number (99|8, 98)$"):
            pages.rules(wrong)
