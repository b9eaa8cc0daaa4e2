"""report.html: what it says of a report.json, in two languages; what a browser makes of it; what is refused."""

import copy
import json
import re
import string
from pathlib import Path

import browser
import pytest

from specjax import cli, report
from specjax.errors import UserError
from specjax.report import page, texts
from specjax.report.read import checked
from specjax.report.summary import certainty, sentence
from specjax.report.words import Words

HOSTILE = (
    "<script>alert(1)</script> \"'`&amp; \u202eabc\u202c \u05d0\u05d1\u05d2\u200f \x00\x1b[31m \ud800 ${x} {{ 7*7 }}"
)

VIEWS = (("en", 1440, "light"), ("en", 390, "dark"), ("fr", 390, "light"), ("fr", 1440, "dark"))


def values(loss, **more):
    return {"loss": loss, "token_accuracy": None, "exact": None, "chrf": None, "rouge_l": None, **more}


def method(name, kind, rank, rate, loss, forgotten, **more):
    """A method that ended at a loss, of two seeds at its best rate, one at another, one stopped half-way."""
    trials = []
    for seed, own, stopped, apart in ((0, rate, "", -0.01), (1, rate, "", 0.01), (2, 2 * rate, "", 0.1)):
        points = [(10, 2.5), (20, 2.2), (40, loss)]
        curve = [
            {"step": step, "loss": {"validation": at + apart, "general": 3 + forgotten * step / 40}}
            for step, at in points
        ]
        trials.append({"rate": own, "rank": rank, "seed": seed, "steps": 40, "stopped": stopped, "curve": curve})
    trials.append(trials[0] | {"rate": 4 * rate, "steps": 20, "stopped": "halving", "curve": trials[0]["curve"][:2]})
    trials.append(trials[0] | {"seed": 3, "steps": 10, "stopped": "failed", "curve": trials[0]["curve"][:1]})
    known = {"before": values(2.8, exact=0.02), "after": values(loss, exact=0.14, chrf=0.382)}
    general = {"before": values(3.0), "after": values(3.0 + forgotten), "low": None, "high": None, "seeds": 2}
    return {
        **{"name": name, "method": kind, "rank": rank, "alpha": 32 if rank else None, "status": "done", "why": ""},
        **{"rate": rate, "trainable": 4_884_480, "total": 139_399_488, "seconds": 431.7, "compile_seconds": 21.0},
        **{"tokens": 81_920, "tokens_per_s": 1310.0, "peak_memory_bytes": 1_470_000_000, "saved_bytes": 19_600_000},
        "shared_process": kind == "lora",
        "measures": {"validation": known | {"low": loss - 0.01, "high": loss + 0.01, "seeds": 2}, "general": general},
        **{"trials": trials, "folder": f"methods/{name}", "config": f"methods/{name}/config.json"},
        "commands": [f"specjax train --config=methods/{name}/config.json --workdir=again"],
        **more,
    }


def failed(name, why):
    keys = method(name, "lora", 256, 1e-4, 1.0, 0.0)
    return dict.fromkeys(keys) | {"name": name, "method": "other", "status": "failed", "why": why}


def made():
    """A report, as `specjax compare` writes it."""
    return {
        **{"format": 1, "specjax": "0.2.0", "made": "2026-11-28T17:00:00Z", "seconds": 1234.5},
        "machine": {"device": "cpu x 2", "memory_bytes": 24 << 30, "jax": "0.10.1"},
        "base": {"path": "demo/base", "family": "llama", "parameters": 134515008, "dtype": "float32"},
        "data": {
            **{"path": "mine.jsonl", "kind": "pairs", "rows": 7814, "held_out_rows": 156, "loss_tokens": 158430},
            **{"max_length": 148, "cut_share": 0.0, "split": "taken"},
            "example": [["user: What?\nassistant: ", False], ["That.", True]],
        },
        "general": [{"name": "general", "path": "general.jsonl", "shipped": True, "rows": 128}],
        "budget": {"steps": 40, "tokens_per_step": 2048, "seconds": None, "seeds": [0, 1]},
        "grid": {"full": [2e-5], "lora": [2e-4], "source": "times"},
        "sets": {"domain": "validation", "forgetting": ["general"]},
        "methods": [
            method("full", "full", None, 2e-5, 2.0, 0.3, trainable=134_515_008),
            method("sft", "sft", None, 2e-5, 1.955, 0.12, trainable=134_515_008),
            method("lora_r16", "lora", 16, 2e-4, 1.965, 0.04),
            failed("x" * 90, HOSTILE),  # a name that has no place to be broken
        ],
        "answers": [
            {
                **{
                    "set": "validation",
                    "prompt": "What does tail do?",
                    "expected": "It prints ten lines.",
                    "base": "A tail is",
                },
                "said": {"full": "", "lora_r16": "It prints 10 lines."},
            },
            {
                **{"prompt": HOSTILE, "expected": None, "base": HOSTILE},
                "said": {"full": HOSTILE * 3, "sft": "word " * 20_000, "lora_r16": "x" * 100_000},
            },
        ],
        "target": {
            **{"model": "meta-llama/Llama-3.1-8B", "parameters": 8_030_261_248, "price": None},
            "rows": [
                {"method": "sft", "tpu": None, "gpu": "h100:8", "bytes_per_chip": {"tpu": None, "gpu": 23 << 30}},
                {"method": "lora_r16", "tpu": "v5e:2x2", "gpu": "h100:1", "bytes_per_chip": {"gpu": 15 << 30}}
                | {"seconds_per_million_tokens": {"gpu": 42.0}},
            ],
        },
        "advice": {"best": "lora_r16", "lowest_loss": "sft", "nats_apart": 0.01, "forgets_of": 0.33},
    }


@pytest.fixture
def found():
    return made()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report in each language: a file."""
    folder = tmp_path_factory.mktemp("pages")
    for lang in texts.LANGUAGES:
        report.write(made(), folder / f"{lang}.html", lang)
    return {lang: folder / f"{lang}.html" for lang in texts.LANGUAGES}


@pytest.fixture
def without_curves(monkeypatch):
    """The page without its figures, which take most of the time."""
    monkeypatch.setattr(page, "_draws", lambda: False)


def bare(text):
    """A page's text, without its elements and its blanks."""
    return " ".join(re.sub(r"<[^>]*>", "", text).split())


@pytest.mark.skipif(not browser.PROGRAM, reason=browser.MISSING)
def test_a_browser_shows_the_page_wide_and_narrow_light_and_dark_and_asks_no_network(pages, tmp_path):
    chromium = browser.Browser(tmp_path / "profile")
    try:
        grounds = {"light": set(), "dark": set()}
        for lang, width, scheme in VIEWS:
            chromium.open(pages[lang], width=width, scheme=scheme)
            assert chromium.value("document.documentElement.scrollWidth") <= width
            inside = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth"
            assert (
                chromium.value(f"{inside} && !e.closest('pre, svg, thead')).map(e => e.outerHTML.slice(0, 200))") == []
            )
            drawn = "[...document.querySelectorAll('figure > svg')].map(e => [e.getBoundingClientRect().height > 150,"
            assert chromium.value(f"{drawn} e.getAttribute('aria-label').length > 20])") == [[True, True]] * 4
            ids = chromium.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
            assert len(ids) == len(set(ids)) > 100
            used = chromium.value("[...document.querySelectorAll('use')].map(e => e.getAttribute('href').slice(1))")
            assert set(used) <= set(ids)
            grounds[scheme].add(chromium.value("getComputedStyle(document.body).backgroundColor"))
            assert chromium.value("document.scripts.length") == 0
            said = [*chromium.seen("Log.entryAdded"), *chromium.seen("Runtime.consoleAPICalled")]
            assert said + chromium.seen("Runtime.exceptionThrown") + chromium.seen("Network.loadingFailed") == []
            asked = [event["request"]["url"] for event in chromium.seen("Network.requestWillBeSent")]
            assert asked == [pages[lang].as_uri()]
        assert [len(seen) for seen in grounds.values()] == [1, 1] and grounds["light"] != grounds["dark"]
    finally:
        chromium.close()


def test_the_page_says_what_was_found_in_english_and_in_french(pages):
    told = {lang: path.read_text(encoding="utf-8") for lang, path in pages.items()}
    assert all(f'<html lang="{lang}">' in text for lang, text in told.items())
    english, french = (bare(told[lang]).replace("\u202f", " ").replace("\xa0", " ") for lang in ("en", "fr"))
    assert (
        "Take LoRA r16 at 2e-4: within 0.010 nats of SFT, it forgets a third of what full fine-tuning forgets, and it "
        "fits h100:1 or v5e:2x2 at the size of meta-llama/Llama-3.1-8B." in english
    )
    assert (
        "Prenez LoRA r16 à 2e-4 : à 0,010 nat de SFT, il oublie un tiers de ce qu’oublie l’affinage complet et il "
        "tient sur h100:1 ou v5e:2x2 à la taille de meta-llama/Llama-3.1-8B." in french
    )
    overlap = "The 95 % intervals of LoRA r16 and SFT over 2 seeds overlap: they cannot be told apart here."
    assert overlap in english and "7,814" in english and "7 814" in french and "1,37 sur 24,0 Gio" in french
    # Of the curves: the mean over the seeds of the best rate, what it learned and forgot, and where others ended.
    assert "LoRA r16: 1.965 nats at step 40" in english and "LoRA r16: 2.065 nats at 4e-4" in english
    assert "LoRA r16: learned 0.835 nats, forgot 0.040 nats" in english and "LoRA r16: 2.190 nats at 8e-4" in english
    assert "full fine-tuning" in english and "affinage complet" in french and "perte" in french and "oubli" in french
    assert "It prints <mark>10</mark> lines." in told["en"] and "<mark>That.</mark>" in told["en"]
    assert "<bdi>validation</bdi>" in told["en"] and "<details>" not in told["en"]
    assert "<i>(ends at once)</i>" in told["en"] and "general +0.040" in english


def test_foreign_text_stays_text_and_long_text_is_cut_with_a_word(found, tmp_path):
    for name in ("method", "name"):
        found["methods"][0][name] = HOSTILE
    found["methods"][1]["name"] = found["methods"][1]["method"] = "\x1b\x00\ud800"  # short: drawn whole
    found["sets"]["forgetting"] = [HOSTILE]
    report.write(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|\x00|\x1b|\u202e|\son\w+=", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "‹RLO›" in text and "{{ 7*7 }}" in text
    assert "… 98,500 more characters" in text and "… 98,501 more characters" in text and len(text) < 60_000
    assert {target[:1] for target in re.findall(r"(?:href|src)=\"?([^\" >]*)", text)} == {"#", "d"}  # data:


def test_many_answers_are_folded_but_for_some_of_each_set(found, without_curves):
    found["answers"] = [
        {"set": name, "prompt": f"{name} {i}", "said": {}} for name in ("one", "two") for i in range(40)
    ]
    shown, _, folded = page.html(checked(found), "en").partition("<details>")
    assert re.findall(r"<h3[^>]*>(\w+ \d+)<", shown) == ["one 0", "one 1", "one 2", "two 0", "two 1", "two 2"]
    assert "<summary>54 more prompts</summary>" in folded and "20 more prompts are in report.json." in folded


def leaves(value, path=()):
    """The path of every value in a report, those of lists' first entries alone."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def test_every_value_but_a_name_may_be_null(found, without_curves):
    del found["methods"][1:], found["answers"][1:]
    refused, paths = set(), list(leaves(found))
    assert len(paths) > 100
    for path in paths:
        made = copy.deepcopy(found)
        inner = made
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = None
        try:
            page.html(checked(made), "fr")
        except UserError as error:
            assert str(error).startswith("the report") and "\n" not in str(error)
            refused.add(".".join(str(key) for key in path))
    # What no report can be without, and entries of lists.
    wanted = "format methods methods.0.name answers.0.prompt target.rows.0.method general.0.name"
    wanted += " methods.0.trials.0.curve.0.step methods.0.trials.0.curve.0.loss"
    wanted += " methods.0.measures.validation methods.0.measures.general"
    wanted += " methods.0 methods.0.trials.0 methods.0.trials.0.curve.0 methods.0.commands.0 answers.0 target.rows.0"
    wanted += " general.0 budget.seeds.0 sets.forgetting.0 data.example.0 data.example.0.0"
    assert refused == set(wanted.split())


def test_figures_of_nulls_are_those_that_are_left(found):
    for one in found["methods"]:
        for trial in one["trials"] or ():
            trial["curve"][0]["loss"]["validation"] = None
            trial["curve"][-1]["loss"].pop("general", None)
            for point in trial["curve"][1:2]:
                point["loss"]["general"] = float("nan")
    found["methods"][0]["trials"][0]["curve"] = []
    found["methods"][1]["trials"] = [found["methods"][1]["trials"][0] | {"rate": None}]
    found["methods"][2] |= {"measures": {}, "seconds": float("nan"), "peak_memory_bytes": float("inf")}
    assert page.html(checked(found), "en").count("<figure>") == 3
    assert page.html(checked(found | {"methods": [failed("lora", "")]}), "en").count("<figure>") == 0


@pytest.mark.parametrize(
    "advice, says",
    [
        ({"best": None}, "No method can be recommended."),
        (
            {"lowest_loss": "lora_r16"},
            "LoRA r16 at 2e-4: its loss on held-out rows is the lowest, 1.965 nats per token",
        ),
        ({"nats_apart": 0.0, "forgets_of": 1.0}, "LoRA r16 at 2e-4: as good as SFT, it forgets as much as full"),
        ({"forgets_of": 2.5}, "LoRA r16 at 2e-4: within 0.010 nats of SFT, it forgets 2.5 times what full fine"),
        ({"forgets_of": None}, "LoRA r16 at 2e-4: within 0.010 nats of SFT, it forgets 0.040 nats of general, and it"),
    ],
)
def test_the_sentence_says_what_was_advised_and_why(found, advice, says):
    found["advice"] |= advice
    words = Words("en")
    assert sentence(checked(found), words).replace("\u202f", " ").removeprefix("Take ").startswith(says)
    assert sentence(checked(found), Words("fr"))


def test_how_sure_it_is_depends_on_the_seeds(found):
    found["methods"][1]["measures"]["validation"] |= {"low": 1.90, "high": 1.91}
    assert "do not overlap" in certainty(checked(found), Words("en"))[-1]
    found["advice"] |= {"best": "sft", "nats_apart": 0.0}  # the least loss: it is held against the next one
    assert "of SFT and LoRA r16" in certainty(checked(found), Words("en"))[-1]
    found["advice"] |= {"best": "lora_r16"}
    found["methods"][2]["measures"]["validation"] |= {"low": None, "high": None}
    assert certainty(checked(found), Words("en"))[-1].startswith("One seed: there is no interval")


def test_both_languages_have_every_text_with_the_same_places():
    for key, both in texts.TEXT.items():
        english, french = ({name for _, name, _, _ in string.Formatter().parse(text) if name} for text in both)
        assert english == french, key


def test_the_verb_writes_the_page_beside_the_report_or_where_it_is_told(found, tmp_path, capsys, without_curves):
    text = json.dumps(found)
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    other = tmp_path / "new" / "rapport.html"
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 0
    assert cli.main(["report", f"--workdir={tmp_path}", "--lang=fr", f"--out={other}"]) == 0
    assert "pip install 'specjax[report]'" in capsys.readouterr().out
    assert 'lang="en"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'lang="fr"' in other.read_text(encoding="utf-8")
    assert cli.main(["report", f"--workdir={tmp_path}", f"--out={other}"]) == 0  # a report may be replaced
    mine = tmp_path / "mine.html"
    mine.write_text("mine", encoding="utf-8")
    for out in (mine, tmp_path / "report.json"):
        assert cli.main(["report", f"--workdir={tmp_path}", f"--out={out}"]) == 2
        assert capsys.readouterr().err.startswith(f"specjax: --out={out} is ")
    assert mine.read_text() == "mine" and (tmp_path / "report.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "report.json cannot be read (No such file or directory): run `specjax compare` again on this workdir"),
        ("{", "report.json is not JSON"),
        ("[]", "report.json does not hold a JSON object"),
        ('{"format": 2}', "report.json has the format 2, and this specjax reads 1"),
        ('{"methods": []}', "report.json has the format None"),
        ('{"format": 1, "methods": []}', "report.json has no methods"),
        ('{"format": 1, "methods": [{"name": "a", "rate": "x"}]}', "report.json: methods[0]: rate is 'x': give it a"),
        ('{"format": 1, "methods": [{"name": "a", "trials": [{"curve": [{}]}]}]}', "trials[0].curve[0]: step is None"),
        ('{"format": 1, "methods": [{"name": "a"}], "data": {"example": ["x"]}}', "report.json: data: example is ['x'"),
    ],
)
def test_what_is_no_report_is_a_sentence(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("specjax: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "report.html").exists()


def test_another_language_is_refused(found, tmp_path):
    with pytest.raises(UserError, match="^lang is 'de': it is one of en, fr"):
        report.write(found, Path(tmp_path) / "report.html", "de")
