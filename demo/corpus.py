"""The demo's data, real and on every machine: the Python installation that runs this script.

    python demo/corpus.py --out DIR

Nothing is imported but `pydoc_data.topics`, and nothing is downloaded: docstrings and source are read from the standard
library's files. What is held out is chosen by a hash of the top-level module's (or topic's) name, so it is the same for
every Python version, and a held-out module stands in no training file, the base model's included.

| file | rows | for |
|---|---|---|
| text_train, text_eval | {"text"}: language topics and docstrings, as pages of a manual | full.py, the domain's loss |
| pairs_train, pairs_eval | {"instruction", "response"}: a question, the docstring's first paragraph | sft.py, lora.py |
| preference_train, preference_eval | {"prompt", "chosen", "rejected"}: its own answer, and another thing's | dpo.py |
| general_eval | {"text"}: source code of held-out modules | what is forgotten |
| base_train, base_eval | {"text"}: topics and docstrings as they stand, and the source code | the base model |
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SALT = "specjax-4"  # the first of its kind that holds out `textwrap`, whose questions are easily judged by eye
HELD_OUT = 0.1  # of the modules, and of the topics
MIN_PROSE = 200  # characters; shorter docstrings say too little to be a document
MIN_ANSWER, MAX_ANSWER = 25, 400
EVAL_PAIRS, EVAL_CHARACTERS, GENERAL_CHARACTERS = 150, 50_000, 60_000  # what the demo measures in seconds
BASE_PROSE, BASE_CODE = 100_000, 200_000  # characters that measure the base model
LONGEST = 12_000  # characters of one document of an eval set

# Test code, dead packages that later Pythons lack, tables and generated files: neither prose nor code that one reads.
SKIP_MODULES = {"idlelib", "lib2to3", "distutils", "encodings", "pydoc_data", "turtledemo", "ensurepip", "test", "this"}
SKIP_PARTS = {"test", "tests", "testmock", "site-packages", "__pycache__", "_bundled"}
SKIP_FILES = {"entities.py", "_sysconfigdata.py", "keyword.py", "token.py", "sre_constants.py", "tzdata.py"}
TWINS = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_collections_abc": "collections"}

# First words of a docstring that are no verb in the imperative.
NO_VERBS = set("a an the this these if in it all no not for when like same internal helper true false see to".split())


class Thing(NamedTuple):
    """A module, class or function that has a docstring."""

    module: str  # the top-level one
    name: str  # dotted, as one would write it
    kind: str  # module | class | function
    signature: str
    doc: str


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(f"{SALT}/{name}".encode()).digest()[:6], "big") / 2**48


def held_out(name: str) -> bool:
    """Whether a top-level module or a topic is for evaluation only."""
    return share(name) < HELD_OUT


def source_files() -> Iterator[tuple[str, str, str]]:
    """(top-level module, dotted module name, source) of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - SKIP_MODULES):
        single, package = root / f"{module}.py", root / module
        for path in [single] if single.is_file() else sorted(package.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIP_PARTS & set(parts) or path.name in SKIP_FILES:
                continue
            source = path.read_text(encoding="utf-8", errors="replace")
            if len(source) < 200 or re.search(r"(?i)(auto\w*[- ]|is )generated", source[:400]):
                continue
            top = TWINS.get(module, module)
            yield top, ".".join([top, *(part for part in parts[1:] if part != "__init__")]), source


def things(top: str, module: str, source: str) -> Iterator[Thing]:
    """Everything with a docstring in one file, nested classes and methods included."""

    def walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Thing]:
        doc = ast.get_docstring(node) or ""
        match node:
            case ast.Module():
                kind, signature = "module", f"module {name}"
            case ast.ClassDef():
                bases = ", ".join(map(ast.unparse, node.bases))
                kind, signature = "class", f"class {name}({bases})" if bases else f"class {name}"
            case _:
                kind, signature = "function", f"{name}({ast.unparse(node.args)})"
        if doc:
            yield Thing(top, name, kind, signature, doc)
        if kind != "function":
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from walk(child, f"{name}.{child.name}")

    yield from walk(ast.parse(source), module)


def paragraphs(text: str) -> list[str]:
    """A text's paragraphs, whose joining by blank lines is the text."""
    return re.split(r"\n[ \t]*\n", text.strip("\n"))


def without(texts: Iterable[str], seen: set[str]) -> list[str]:
    """Texts without the paragraphs already `seen` (sections of the language reference contain each other)."""
    result = []
    for text in texts:
        kept = []
        for paragraph in paragraphs(text):
            key = " ".join(paragraph.split())
            if len(key) < 60 or key not in seen:
                kept.append(paragraph)
                seen.add(key)
        if len(kept) * 2 > len(paragraphs(text)) and len(" ".join(kept)) >= MIN_PROSE:
            result.append("\n\n".join(kept).rstrip() + "\n")
    return result


def prose(found: list[Thing]) -> tuple[list[str], list[str]]:
    """(train, eval) documents: the topics of `help()`, and docstrings of some length under their signature."""
    from pydoc_data.topics import topics

    documents = [(held_out(f"topic {name}"), text) for name, text in sorted(topics.items())]
    documents += [(held_out(t.module), f"{t.signature}\n\n{t.doc}") for t in found if len(t.doc) >= MIN_PROSE]
    seen: set[str] = set()
    evaluation = without((text for held, text in documents if held), seen)
    return without((text for held, text in documents if not held), seen), evaluation


def page(text: str) -> str:
    """A document as a page of a Markdown manual: headings, prose without its line breaks, the rest fenced as code.

    The base model has read the same prose as it stands in the library, so what is left to learn of the domain is how
    it is written, as it is for a model that once read the web and meets one publisher's manuals.
    """
    result: list[str] = []
    for number, paragraph in enumerate(paragraphs(text)):
        lines = paragraph.splitlines()
        title = len(lines) == 2 and len(set(lines[1])) == 1 and not lines[1][0].isalnum()
        if title or (number == 0 and len(lines) == 1):
            result.append(f"{'#' if number == 0 else '##'} {lines[0].strip()}")
        elif not lines[0].startswith(" ") and not re.search(r"^>>>|::=|  \S+  ", paragraph, re.MULTILINE):
            result.append(" ".join(paragraph.split()))
        elif result and result[-1].startswith("```"):
            result[-1] = f"{result[-1].removesuffix('```')}\n{textwrap.dedent(paragraph)}\n```"
        else:
            result.append(f"```\n{textwrap.dedent(paragraph)}\n```")
    return "\n\n".join(result) + "\n"


def answer(doc: str) -> str | None:
    """A docstring's first paragraph on one line, where it reads as a sentence of fair length."""
    text = " ".join(paragraphs(inspect.cleandoc(doc))[0].split())
    plain = MIN_ANSWER <= len(text) <= MAX_ANSWER and text[0].isalpha() and text[0].isupper() and " " in text
    return text if plain and not re.search(r">>>|->|^\w+\(|[=*~-]{3}", text) else None


def questions(thing: Thing, text: str) -> list[tuple[str, str]]:
    """All (instruction, response) phrasings for one thing."""
    name = f"`{thing.name}`"
    if thing.kind == "module":
        return [(f"What is the module {name} for?", text), (f"Explain the module {name}.", text)]
    if thing.kind == "class":
        return [(f"What is {name}?", text), (f"Explain {name}.", text), (f"What is the class {name} for?", text)]
    pairs = [(f"What does {name} do?", text), (f"Explain {name}.", text), (f"What is the purpose of {name}?", text)]
    sentence = re.split(r"(?<=[\w)])\.(?:\s|$)| -- |:", text)[0].rstrip(" .,;")
    verb = sentence.split()[0]
    imperative = verb.isalpha() and verb.lower() not in NO_VERBS and not verb.endswith(("s", "ed", "ing"))
    if imperative and 25 <= len(sentence) <= 120:
        wish = verb.lower() + sentence[len(verb) :]
        use = f"Use `{thing.signature}`." if len(thing.signature) <= 80 else f"Use {name}."
        pairs += [(f"How do I {wish}?", use), (f"Which function of `{thing.module}` would {wish}?", use)]
    return pairs


def pairs(found: list[Thing]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, eval) questions about public names; two phrasings a thing in train, one in eval, chosen by its name."""
    train, evaluation, seen = [], [], set()
    for thing in found:
        text = None if re.search(r"(^|\.)_", thing.name) else answer(thing.doc)
        if text is None or (text, thing.module) in seen:
            continue
        seen.add((text, thing.module))
        ranked = sorted(questions(thing, text), key=lambda pair: share(pair[0]))
        rows = [{"instruction": question, "response": response} for question, response in ranked]
        if held_out(thing.module):
            evaluation.append(rows[0])
        else:
            train += rows[:2]
    known = {row["response"] for row in train}
    fresh = [row for row in evaluation if row["response"] not in known]
    return train, sorted(fresh, key=lambda row: share(row["instruction"]))[:EVAL_PAIRS]


def capped(texts: Iterable[str], total: int) -> list[str]:
    """A sample in the order of a hash: each text's beginning up to a line's end, `total` characters at most."""
    kept, room = [], total
    for text in sorted(texts, key=share):
        text = text if len(text) <= LONGEST else text[: text.rindex("\n", 0, LONGEST) + 1]
        if len(text) <= room:
            kept.append(text)
            room -= len(text)
    return kept


def build() -> dict[str, list[dict[str, str]]]:
    """All files' rows, by name."""
    sources = list(source_files())
    found = [thing for source in sources for thing in things(*source)]
    text_train, text_eval = prose(found)
    pairs_train, pairs_eval = pairs(found)
    code_train = [code for top, _, code in sources if not held_out(top)]
    code_eval = [code for top, _, code in sources if held_out(top)]
    texts = {
        "text_train": [page(text) for text in text_train],
        "text_eval": capped(map(page, text_eval), EVAL_CHARACTERS),
        "general_eval": capped(code_eval, GENERAL_CHARACTERS),
        "base_train": text_train + code_train,
        "base_eval": capped(text_eval, BASE_PROSE) + capped(code_eval, BASE_CODE),
    }
    rows = {name: [{"text": text} for text in kept] for name, kept in texts.items()}
    rows |= {"pairs_train": pairs_train, "pairs_eval": pairs_eval}
    return rows | {"preference_train": preferences(pairs_train), "preference_eval": preferences(pairs_eval)}


def preferences(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each question with its answer, and with the answer to a question far from it."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    others = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
    return [
        {
            "prompt": said("user", row["instruction"]),
            "chosen": said("assistant", row["response"]),
            "rejected": said("assistant", other["response"]),
        }
        for row, other in zip(rows, others, strict=True)
        if other["response"] != row["response"]
    ]


def write(out: Path) -> dict[str, tuple[int, int]]:
    """Writes all files into `out`; (rows, characters) by name."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in build().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = (len(rows), sum(characters(value) for row in rows for value in row.values()))
    return counts


def characters(value: Any) -> int:
    """Of a text, or of the messages of a conversation."""
    return len(value) if isinstance(value, str) else sum(len(message["content"]) for message in value)


def main() -> None:
    """Builds, and prints the counts."""
    parser = argparse.ArgumentParser(description="Builds the demo's data from this Python's own standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files (made if need be)")
    out = parser.parse_args().out
    counts = write(out)
    print(f"{'file':<18}{'rows':>8}{'characters':>13}")
    for name, (rows, size) in counts.items():
        print(f"{name:<18}{rows:>8,}{size:>13,}")


if __name__ == "__main__":
    main()
