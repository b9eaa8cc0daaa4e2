"""Public datasets by domain: a dated table of what their cards say, and the flags with which specjax reads them.

What was not read about a dataset is None, and shown as not known.
"""

import json
import os
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, NamedTuple

from specjax.advise import printed
from specjax.errors import UserError, nearest

NOT_KNOWN = "not known"
SECONDS = 10  # that the hub has to answer
# What a pair is like that teaches something. The example is made up to show the form, and belongs to no set.
PAIR = (
    ("asks", '"May I carry unused leave into next year? (Rule: up to five days, until 31 March.)"'),
    ("answers", '"Yes, up to five days. Take them by 31 March; after that they lapse."'),
    ("the question", "is one that your users will ask, in their words, with what is needed to answer it"),
    ("the answer", "is whole, true, as long as you want answers to be, in your tone, and ends where it should"),
    ("of all pairs", "each says something that the others do not, and none is in the set that you evaluate on"),
)


class Entry(NamedTuple):
    """A dataset.

    Attributes:
      name: its name on the hub.
      languages: two letters each, or words.
      source: where this was read.
      address: the value of `data.train`, if the name alone does not work.
      rows: their number, in words; this and everything below is None if it was not read.
      licence: as the card names it.
      commercial: whether the licence allows commercial use.
      columns: the relevant columns.
      flags: keys after `config.data.`, with their values.
      faults: known problems.
    """

    name: str
    languages: list[str]
    source: str
    address: str | None = None
    rows: str | None = None
    licence: str | None = None
    commercial: bool | None = None
    columns: list[str] | None = None
    flags: dict[str, str] | None = None
    faults: str | None = None

    @property
    def given(self) -> list[str] | None:
        """The command's flags that read it; None if they are not known."""
        if self.flags is None:
            return None
        return [f"--config.data.{key}={value}" for key, value in self.flags.items()]


def table() -> tuple[str, dict[str, list[Entry]]]:
    """The date on which the cards were read, and domain -> its datasets."""
    read = tomllib.loads(files("specjax.advise").joinpath("domains.toml").read_text(encoding="utf-8"))
    when = read.pop("read")
    return when, {domain: [Entry(**entry) for entry in entries] for domain, entries in read.items()}


def chosen(domain: str, lang: str = "") -> tuple[str, list[Entry]]:
    """The date on which the cards were read, and the datasets of a domain, in a language if one is given.

    Raises:
      UserError: no such domain, or no such language in the table.
    """
    when, domains = table()
    if domain not in domains:
        raise UserError(
            f"--domain={domain} is no domain of the table: use one of {', '.join(domains)}."
            f"{nearest(domain, domains)} Your own data need none."
        )
    named = {one for entries in domains.values() for entry in entries for one in entry.languages}
    languages = sorted(one for one in named if len(one) == 2)
    if lang and lang not in languages:
        raise UserError(
            f"--lang={lang} is no language of the table: use one of {', '.join(languages)}, or leave it out."
        )
    return when, [entry for entry in domains[domain] if not lang or lang in entry.languages]


def show(domain: str, lang: str = "", ask: bool = False) -> None:
    """Prints the datasets of a domain, and what a good pair looks like.

    Args:
      domain: a domain of the table.
      lang: the datasets' language; "": any.
      ask: ask the hub about each dataset.

    Raises:
      UserError: see `chosen`.
    """
    when, entries = chosen(domain, lang)
    what = f"Datasets for {domain}{f' in {lang}' if lang else ''}"
    if entries:
        print(f"{what}, as their cards were read on {when}; none was opened, and the licence is yours to read\n")
    else:
        print(f"{what}: the table of {when} has none\n")
    for entry in entries:
        print(f"  {entry.name}")
        for name, value in lines(entry, check(entry) if ask else ""):
            printed.entry(f"  {name}", value)
        print()
    printed.say("A good pair", PAIR)


def lines(entry: Entry, checked: str = "") -> Iterator[tuple[str, str]]:
    """(what, value) lines for a dataset; `checked` is what the hub says about it."""
    told = lambda value: NOT_KNOWN if value is None else value  # noqa: E731
    use = {None: f"commercial use: {NOT_KNOWN}", True: "allows commercial use", False: "NO commercial use"}
    yield "language", f"{', '.join(entry.languages)}; {told(entry.rows)} rows"
    yield "licence", f"{told(entry.licence)}; {use[entry.commercial]}"
    yield "columns", ", ".join(entry.columns) if entry.columns else NOT_KNOWN
    yield "known faults", told(entry.faults)
    given = entry.given
    if given is None:
        yield "read by", f"{NOT_KNOWN}: look at its columns, and give --config.data.columns.ROLE=COLUMN"
    else:
        yield "read by", " ".join([f"--config.data.train={entry.address or entry.name}", *given])
    yield "source", entry.source
    if checked:
        yield "the hub", checked


def check(entry: Entry) -> str:
    """What the hub says about a dataset now, in words, or that the hub cannot be asked."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline:
        return "not checked on this machine (HF_HUB_OFFLINE is set)"
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{host}/api/datasets/{urllib.parse.quote(entry.name)}", timeout=SECONDS) as answer:
            found: dict[str, Any] = json.loads(answer.read(1 << 24))
    except urllib.error.HTTPError as error:
        gone = "it is not there, or not for everyone" if error.code in (401, 403, 404) else "asked in vain"
        return f"{gone} (status {error.code})"
    except (OSError, ValueError) as error:
        return f"not checked on this machine ({getattr(error, 'reason', error)})"
    said = (found.get("cardData") or {}).get("license")
    licence = ", ".join(said) if isinstance(said, list) else said or "none named"
    return f"it is there; licence: {licence}; changed {str(found.get('lastModified', NOT_KNOWN))[:10]}"
