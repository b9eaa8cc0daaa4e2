"""Links that lead outside: `tests/test_docs.py` checks their form, `make links` opens them where there is a network."""

import re
import sys
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
PLACES = (
    *(
        "*.md",
        "llms.txt",
        "pyproject.toml",
        "CITATION.cff",
        "mkdocs.yml",
        "docs/**/*.md",
        "docs/*.py",
        "notebooks/*.ipynb",
    ),
    *("specjax/**/*.py", "specjax/**/*.toml", "configs/*.py", "demo/*.py"),
)
URL = re.compile(r"https?://[^\s)\"'`<>\\\]]+|\barXiv:[\w./-]+")
# What a path begins with, by the host that it is on.
FORMS = {
    "arxiv.org": r"/abs/\d{4}\.\d{5}$",
    "github.com": r"/[\w.-]+/[\w.-]+($|/(blob|tree|issues|pull|releases|security)(/|$))",
    "huggingface.co": r"(/(datasets|spaces))?/(?!(datasets|spaces)/)[\w.-]+/[\w.-]+"
    r"($|/(blob|tree|raw|resolve|blame|commit|commits|discussions)/[\w.-]|/viewer$)",
}
NAMES = {"http://www.w3.org/2000/svg", "https://huggingface.co"}  # a namespace, and where the hub is: no page
SECONDS = 20


def outside() -> dict[str, list[str]]:
    """Every link with the places that have it; `arXiv:ID` is one too."""
    found = defaultdict(list)
    for path in sorted({path for place in PLACES for path in ROOT.glob(place)}):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for link in URL.findall(line):
                link = re.sub(r"^arXiv:", "https://arxiv.org/abs/", link.rstrip(".,;:"))
                if link not in NAMES and "{" not in link:
                    found[link].append(f"{path.relative_to(ROOT)}:{number}")
    return found


def wrong(link: str) -> str:
    """What is wrong with its form; "" where nothing is."""
    parts = urlsplit(link)
    host = (parts.hostname or "").removeprefix("www.")
    if parts.scheme != "https":
        return "not https"
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host) or parts.username or parts.port:
        return "no plain host"
    path = parts.path.rstrip("/")
    return "" if re.match(FORMS.get(host, ""), path) else f"no path as {host} has them"


def opened(link: str) -> str:
    """What went wrong when it was opened; "" where nothing did."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (specjax, make links)"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return ""
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        return str(error)


def main() -> int:
    """Opens all; the exit status is 1 if any fails."""
    found = outside()
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(found, pool.map(opened, found), strict=True))
    failed = {link: said for link, said in answers.items() if said}
    for link, said in failed.items():
        print(f"{link}: {said} ({', '.join(found[link])})")
    print(f"{len(found)} links, {len(failed)} of them fail")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
