"""The table of public datasets: each entry's flags by the config's own checks, what the hub is asked, bad input."""

import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from specjax.advise import domains
from specjax.cli import main, read_config
from specjax.config import validate
from specjax.data.formats import recognise
from specjax.errors import UserError

BASE = str(Path(__file__).parent.parent / "demo" / "base_config")
READ, TABLE = domains.table()


@pytest.mark.parametrize("domain", TABLE)
def test_a_domain_has_five_sets_or_more_whose_flags_are_valid_and_read_their_columns(domain):
    assert len(TABLE[domain]) >= 5 and READ.startswith("2026-")
    names = [entry.name for entry in TABLE[domain]]
    assert len(set(names)) == len(names)
    for entry in TABLE[domain]:
        assert entry.source.startswith("https://") and entry.languages and entry.rows
        if entry.given is None:
            continue
        config = read_config("", [f"--config.data.train={entry.address or entry.name}", *entry.given])
        config.model.path = "M"
        validate(config)
        assert entry.columns is not None
        found, _ = recognise(entry.columns, config.data.format, config.data.columns.to_dict())
        assert found == ("text" if "columns.text" in entry.flags else found) != "preference"


def test_french_sets_are_found_and_what_was_not_read_is_not_made_up(capsys):
    assert main(["advise", "--domain=tax", "--lang=fr"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "louisbrulenaudet/code-impots" in out and "jhu-clsp/SARA" not in out
    assert "licence not known; commercial use: not known" in out
    assert "--config.data.train=louisbrulenaudet/code-impots --config.data.columns.text=texte" in out
    assert "A good pair" in out and READ in out
    assert main(["advise", "--domain=finance", "--lang=fr"]) == 0
    assert f"Datasets for finance in fr: the table of {READ} has none" in capsys.readouterr().out


def test_a_language_that_no_set_is_in_is_refused():
    with pytest.raises(UserError, match=r"--lang=de is no language of the table: use one of en, fr, or"):
        domains.chosen("law", "de")


def test_the_hub_is_asked_where_it_can_be_and_else_that_is_said(monkeypatch):
    entry, asked = TABLE["law"][0], []

    def answers(what):
        def urlopen(url, timeout):
            asked.append(url)
            if isinstance(what, Exception):
                raise what
            return io.BytesIO(json.dumps(what).encode())

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return domains.check(entry)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert answers({}) == "not checked on this machine (HF_HUB_OFFLINE is set)" and not asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test/")
    found = {"cardData": {"license": "mit"}, "lastModified": "2026-01-02T03:04:05.000Z"}
    assert answers(found) == "it is there; licence: mit; changed 2026-01-02"
    assert asked == [f"https://hub.test/api/datasets/{entry.name}"]
    assert answers(urllib.error.HTTPError("", 404, "", {}, None)) == "it is not there, or not for everyone (status 404)"
    assert answers(urllib.error.URLError("no route")) == "not checked on this machine (no route)"


def test_evaluation_rows_that_train_too_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"id": n, "instruction": f"What is {n}?", "response": f"The number {n}."} for n in range(18)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [*({**row, "id": "x"} for row in rows[:3]), {"id": 9, "instruction": "And 99?", "response": "Too."}]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    assert main(["advise", "--data=train.jsonl", f"--model={BASE}", "--config.data.eval.domain=held.jsonl"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "set domain 4 rows, of which 3 examples train too" in out
    assert "unseen rows 3 examples of domain train too" in out


@pytest.mark.parametrize(
    "given, said",
    [
        ((), "`specjax advise` needs --data, such as"),
        (("--data=x.jsonl",), "`specjax advise` needs --model, such as"),
        (("--domain=lawn",), f"use one of {', '.join(TABLE)}. Did you mean 'law'?"),
        (("--domain=law", "--lang=de"), "--lang=de: value should be one of <en|fr>"),
        (("--lang=fr",), "give --domain too"),
        (("--check",), "--check is of the public datasets"),
        (("--domain=law", "--write=trl"), "--write is of advice for your data"),
        (("--domain=law", "--model=M"), "needs --data"),
        (("--data=x", "--model=M", "--hardware=a100:1"), "give one such as v5e:4x4, v5p:2x2x4"),
    ],
)
def test_a_mistake_is_one_sentence(given, said, capsys):
    assert main(["advise", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
