"""What the pages tell to run is run on a tiny base and a few rows, or is marked with what it needs."""

import io
import re
import shlex
import warnings
from pathlib import Path

import pytest
from run_fixtures import PAIRS, TEXTS, specjax, write_base, write_rows

from specjax import process
from specjax.cli import parse
from specjax.compare import child, record
from specjax.config import get_config, merge

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SKILL.md")), *sorted(ROOT.glob("docs/**/*.md"))]
# A mark is a paragraph right above its block: "*Needs a TPU VM.*", in French "*Demande ...*".
BLOCK = re.compile(
    r"(?:^\*(?:Needs|Demande) (?P<needs>.+)\.\*\n\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S
)
SHOWN = ("text", "json")

# What the pages call a model, and rows.
MODELS = (
    "org/name-or-folder meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct meta-llama/Llama-3.1-8B-Instruct "
    "mistralai/Mistral-7B-Instruct-v0.3 llama demo/base M MODEL DIR"
).split()
SETS = "pairs_train pairs_eval text_train text_eval general_eval".split()
ROWS = [*"mine paires train domain general tax law held".split(), *(f"runs/demo/data/{name}" for name in SETS)]
ANSWERED = [row | {"reply": row["response"]} for row in PAIRS]  # a page renames a column
PREFERENCES = [
    {"prompt": one["instruction"], "chosen": one["response"], "rejected": other["response"]}
    for one, other in zip(PAIRS, PAIRS[1:], strict=False)
]
# What makes a run of a page short. The page's own values are checked in tests/test_docs.py.
SIZES = {"batch_size": 8, "accumulate": 1, "data.length": 64, "log.tensorboard": False}
LENGTH = {"steps": 8, "epochs": 1.0, "optimizer.warmup_steps": 2, "eval.every": 0}
SHORT = {
    "train": SIZES | LENGTH,
    "compare": SIZES | {"eval.answers": 1, "eval.max_new_tokens": 2},
    "eval": SIZES,
    "plan": {"batch_size": 16, "data.length": 128},
    "generate": {"--max_new_tokens": 4},
    "chat": {"--max_new_tokens": 4},
    "launch": {"--dry_run": True},  # processes that train together: tests/test_processes.py
}
FEWER = {
    r"--step=\d+": "--step=8",
    r"\bsteps=\d+": "steps=2",
    "max_new_tokens=64": "max_new_tokens=4",
    "length=1024": "length=64",
    "--budget=20m": "--steps=2",
    "--target=v5e:4x4 --target=v5p:2x2x1": "--target=v5e:4x4",
    # of configs:
    r'"steps": \d+': '"steps": 8',
    r'\{"sweep": .*"auto".*\}': "{}",
    r"\n    config\.compare\.lora_r16.*": "",
    r"\[5e-4, 1e-3, 2e-3, 4e-3\]": "[1e-3, 2e-3]",
    r"\[8, 16\]": "[8]",
    r"\(0\.125, 0\.25, 0\.5\)": "(0.5,)",
}


def short(text: str) -> str:
    for long, few in FEWER.items():
        text = re.sub(long, few, text)
    return text


def commands(text: str) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("guides") / "base", hidden_size=64, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def runs(base, one_device, steps_made_once):
    """What earlier pages left: a run of LoRA, and one of every weight."""
    write_rows(base.parent / "pairs.jsonl", PAIRS)
    made = {}
    for kind in ("lora", "sft"):
        keys = {"model.path": base, "data.train": base.parent / "pairs.jsonl"} | SHORT["train"]
        argv = (f"--config.{key}={value}" for key, value in keys.items())
        made[kind] = base.parent / kind
        assert specjax("train", f"--config={ROOT / 'configs' / kind}.py", f"--workdir={made[kind]}", *argv) == 0
    return made


@pytest.fixture
def folder(tmp_path, base, monkeypatch):
    """A folder in which the names of the pages stand for the tiny base and a few rows."""
    monkeypatch.chdir(tmp_path)
    for name in MODELS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(base)
    (tmp_path / "runs" / "demo" / "data").mkdir(parents=True)
    for name in ROWS:
        write_rows(tmp_path / f"{name}.jsonl", TEXTS if "text" in name else ANSWERED)
    write_rows(tmp_path / "pairs.jsonl", PREFERENCES)
    for name in ("mine.txt", "general.txt"):
        (tmp_path / name).write_text("\n".join(row["text"] for row in TEXTS))
    (tmp_path / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        (tmp_path / "configs" / config.name).write_text(short(config.read_text(encoding="utf-8")), encoding="utf-8")
    return tmp_path


def run(words: list[str], monkeypatch) -> None:
    """One command of a page: `specjax VERB ...`, in this process."""
    assert words[0] == "specjax", f"a block that is not marked has the command {words[0]}"
    verb, *argv = words[1:]
    for key, value in SHORT.get(verb, {}).items():
        argv.append(f"{key}={value}" if key.startswith("--") else f"--config.{key}={value}")
    if verb == "plan":
        process.ask_for_no_device()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is VAT?\n"))
    assert specjax(verb, *argv) == 0, " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_is_run_or_says_what_it_needs(page, folder, runs, monkeypatch):
    def here(target, settings, workdir, name, twin):  # of `compare`
        record.record(merge(get_config(), settings), Path(workdir), name, twin)
        return 0, "done", ""

    monkeypatch.setattr(child, "run", here)
    text = page.read_text(encoding="utf-8")
    makes = r"^(?:specjax (?:train|compare)|.*\bsj\.(?:fleet\.)?fit).*?workdir=\"?(runs/[\w-]+)"
    made = set(re.findall(makes, text, re.M))
    for name in set(re.findall(r"\bruns/[\w-]+", text)) - made:
        if not (folder / name).exists():
            (folder / name).symlink_to(runs["sft" if name.endswith("sft") else "lora"])
    names = {"config": get_config()}  # of a file in configs/, where a page shows a piece of one
    for block in blocks(page):
        needs, language, told = block["needs"], block["language"], short(block["text"])
        assert language in ("", "python", *SHOWN)
        if language == "python" and not needs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT's, of transformers
                exec(compile(told, page.name, "exec"), names)
        for words in () if language else commands(told):
            if not needs:
                run(words, monkeypatch)
            elif words[0] == "specjax":
                parse(words[1], words[2:])
