r"""French pairs for the demo on a published model: what the commands of Debian's French manual pages are for and do.

    python demo/french.py --out DIR [--package FILE.deb]

`apt-get download manpages-fr` fetches the package (Debian or a system made of it), of which only its own files are
read. The pages are translations under the GPL (version 3 or later, the originals' licences beside it): they are made
into files on this machine and are no part of specjax. Held out by page; an answer that several pages share stands once.

| file | rows |
|---|---|
| pairs_train, pairs_eval | {"instruction", "response"}: what a page is for, what an option of a command does |
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "manpages-fr"
HELD_OUT = 0.1  # of the pages
EVAL_PAIRS = 150
WORDS = r"\b(le|la|les|des|une?|est|pour|dans|que|qui|avec|du|ou|et|de)\b"
# roff's escapes, and what they are printed as.
ESCAPES = {
    **{r"\-": "-", r"\ ": " ", r"\~": " ", r"\(aq": "'", r"\(bu": "•", r"\(oq": "‘", r"\(cq": "’", r"\(dq": '"'},
    **{r"\(en": "–", r"\(em": "—", r"\(co": "©", r"\(ha": "^", r"\(ti": "~", r"\e": "\\", r"\(rs": "\\"},
    **{r"\(<=": "<=", r"\(>=": ">=", r"\'": "'", "\u00a0": " ", "\u202f": " "},
}


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def plain(text: str) -> str:
    """A page's source without comments, fonts and escapes."""
    text = re.sub(r"(?m)^[.']\\\".*\n", "", text)
    text = re.sub(r"(?m)^\.(?:B|I|BR|IR|RB|RI|BI|IB|SM|SB) (.*)$", lambda line: line[1].replace('"', ""), text)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[-+]?\d|\\[,/&|^%:]|\\m\[[^]]*\]", "", text)
    for escape, printed in ESCAPES.items():
        text = text.replace(escape, printed)
    return text


def french(text: str) -> bool:
    """Whether enough of a text's words are French ones (some pages are translated in part)."""
    return len(re.findall(WORDS, text)) >= max(1, len(text.split()) // 14)


def pairs(name: str, section: str, source: str) -> Iterator[tuple[str, str]]:
    """(question, answer) of one page: what it is for, and what each option of a command does."""
    text, command = plain(source), section in ("man1", "man6", "man8")
    sections = dict(re.findall(r'(?ms)^\.SH "?([^"\n]+?)"?\s*\n(.*?)(?=^\.SH |\Z)', text))
    purpose = re.match(r"[^-]*? - (.*)", " ".join(sections.get("NOM", "").split()))
    if purpose and 15 < len(purpose[1]) < 200 and "\\" not in purpose[1]:
        yield f"À quoi sert la commande `{name}` ?" if command else f"Qu'est-ce que `{name}` ?", purpose[1]
    for option, meaning in re.findall(r"(?ms)^\.TP ?\d*\s*\n(-[^\n]+)\n(.*?)(?=^\.)", text) if command else ():
        option, meaning = (" ".join(part.split()) for part in (option, meaning))
        if 25 < len(meaning) < 350 and len(option) < 45 and "\\" not in meaning + option and french(meaning):
            yield f"Que fait l'option `{option}` de la commande `{name}` ?", meaning


def build(pages: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of both files, of a folder with `man1`, `man2` and so on."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    seen: set[str] = set()
    files = sorted(pages.glob("man*/*.gz"), key=lambda path: (share(path.name.split(".")[0]), path.name))
    for path in files:  # those held out come first: an answer that train has too stands there alone
        name = path.name.split(".")[0]
        source = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        for question, meaning in pairs(name, path.parent.name, source):
            answer = meaning[0].upper() + meaning[1:].rstrip(" .;") + "."
            if answer not in seen:
                seen.add(answer)
                split = "eval" if share(name) < HELD_OUT else "train"
                rows[split].append({"instruction": question, "response": answer})
    rows["eval"] = sorted(rows["eval"], key=lambda row: share(row["instruction"]))[:EVAL_PAIRS]
    return {f"pairs_{split}": found for split, found in rows.items()}


def fetch(folder: Path) -> Path:
    """Debian's package, downloaded into a folder."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        sys.exit("there is no apt-get here, so Debian's French manual pages cannot be had: leave DATA=french out")
    done = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"apt-get finds no {PACKAGE} ({done.stderr.strip().splitlines()[-1]}): leave DATA=french out")
    return next(folder.glob("*.deb"))


def main() -> None:
    """Fetches the package unless one is given, writes the files, prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files (made if need be)")
    parser.add_argument("--package", type=Path, help=f"Debian's {PACKAGE}, already downloaded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = args.package or fetch(Path(scratch))
        subprocess.run(["dpkg", "-x", package, f"{scratch}/files"], check=True)
        rows = build(Path(scratch) / "files" / "usr/share/man/fr")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name:<12} {len(found):>6,} rows, of Debian's {PACKAGE} (GPL-3+)")


if __name__ == "__main__":
    main()
