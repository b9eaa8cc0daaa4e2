"""The site's pages that are made: the landing page of README, the references of the command line and of the config.

The page of the rules of numerics is a file, to which the tests that hold each rule are added.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from specjax import verbs
from specjax.config import keys

ROOT = Path(__file__).parent.parent
PAGES = {
    "llms.txt": "agents",
    "index.md": "landing",
    "reference/command-line.md": "command_line",
    "reference/config.md": "config_keys",
}
RULES = "developers/numerics.md"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those of `docs/` (https://www.mkdocs.org/dev-guide/plugins/#on_files)."""
    from mkdocs.structure.files import File

    for name, maker in PAGES.items():
        files.append(File.generated(config, name, content=globals()[maker]()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Adds the tests to the rules (https://www.mkdocs.org/dev-guide/plugins/#on_page_markdown)."""
    return rules(markdown) if page.file.src_uri == RULES else markdown


def landing() -> str:
    """README, its links those of the site; files that are no page are named and not linked."""
    return _linked("README.md")


def agents() -> str:
    """llms.txt, likewise (https://llmstxt.org)."""
    return re.sub(r"\]\((?!https?:)([^)]*)\.md\)", r"](\1.html)", _linked("llms.txt"))


def _linked(file: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    text = re.sub(r"\[[^\]]+\]\((?!https?:|docs/)([^)]+)\)", r"`\1`", text)
    return text.replace("](docs/", "](")


def command_line() -> str:
    """Each verb's `--help`."""
    parts = ["# Command line", "What `specjax --help` and `specjax VERB --help` print.", _block(verbs.help_of_all())]
    for name in verbs.VERBS:
        parts += [f"## specjax {name}", _block(verbs.help_of(name))]
    return "\n\n".join(parts) + "\n"


def config_keys() -> str:
    """Every key of the config in a table per group."""
    parts = [
        "# Config keys",
        "What `specjax help config` prints, from `specjax/config/__init__.py`. On the command line a key is "
        "`--config.KEY=VALUE`, in a file of `configs/` it is `config.KEY = VALUE`. A key without a default is not set.",
    ]
    for group in dict.fromkeys(key.group for key in keys.keys()):
        parts.append(f"## {group or 'The run'}")
        found = (key for key in keys.keys() if key.group == group)
        rows = (f"| `{key.name}` | {_span(key.default)} | {key.takes} | {_cell(key.means)} |" for key in found)
        parts.append("\n".join(("| key | default | takes | meaning |", "|---|---|---|---|", *rows)))
    return "\n\n".join(parts) + "\n"


def rules(text: str) -> str:
    """The page of the rules with the tests that hold each, by their marks `pytest.mark.rule(NUMBER)`.

    Raises:
      ValueError: for a rule without a test, and for a mark without a rule; the build of the site fails.
    """
    held = marked()
    parts = re.split(r"(?m)^(?=## )", text)
    numbers = [int(re.match(r"## (\d+)\. ", part)[1]) for part in parts[1:]]  # type: ignore[index]
    if wrong := sorted({*numbers} ^ {*held}):
        raise ValueError(f"docs/{RULES}: no test, or no rule, has the number {', '.join(map(str, wrong))}")
    for place, number in enumerate(numbers, 1):
        rows = (f"| {name} | `{file}` |" for name, file in held[number])
        parts[place] = "\n".join((parts[place].rstrip(), "", "| test | file |", "|---|---|", *rows, "", ""))
    return "".join(parts)


def marked() -> dict[int, list[tuple[str, str]]]:
    """Of each rule's number the tests with its mark: their names in words, and their files."""
    found = defaultdict(list)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node in (each for each in body if isinstance(each, ast.FunctionDef)):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rule":
                    words = node.name.removeprefix("test_").replace("_", " ")
                    found[ast.literal_eval(mark.args[0])].append((words.capitalize(), f"tests/{path.name}"))
    return found


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def _span(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
