"""The pages that are made from other files: the API, the glossary, and the way to both from each notebook."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import re
from pathlib import Path

import nbformat
import pytest

from dpteach.flower import installed

pytest.importorskip("tomllib")  # Python 3.10 has neither
if not installed():
    pytest.skip("the API page has Flower's part", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages():
    loader = importlib.machinery.SourceFileLoader("pages", str(ROOT / ".ci" / "pages"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("pages", loader))
    loader.exec_module(module)
    return module


def test_the_pages_are_what_ci_pages_writes_today(pages):
    assert pages.main(check=True) == []


def test_a_changed_docstring_and_a_lost_line_are_noticed(pages, monkeypatch):
    import dpteach

    monkeypatch.setattr(dpteach.clip, "__doc__", "Something else.")
    monkeypatch.setattr(pages, "LINE", "another line")
    stale = pages.main(check=True)
    assert "dpteach/README.md" in stale and len(stale) == 1 + len(NOTEBOOKS)


def test_minutes_that_changed_are_noticed_in_the_notebook_and_in_the_readme(pages, monkeypatch):
    monkeypatch.setattr(pages, "minutes", lambda path: 5)
    assert len(pages.main(check=True)) == 1 + len(NOTEBOOKS)


def test_each_notebook_leads_to_three_to_five_sources_and_each_source_is_used(pages):
    known, read = pages.bibliography().values()
    used = {key for term in pages.terms()["term"] for key in term.get("sources", ())}
    assert set(read) == {pages.number(path) for path in NOTEBOOKS}
    assert [stem for stem, sources in read.items() if not 3 <= len(sources) <= 5] == []
    assert {key for sources in read.values() for key, _ in sources} | used == set(known)
    assert len({url for *_, url in known.values()}) == len(known)


def test_the_api_page_has_every_name_that_the_package_offers(pages):
    import dpteach

    text = pages.api()
    assert [name for name in dpteach._HOME if f"\n### `{name}`\n" not in text] == []


def test_every_link_on_the_pages_leads_somewhere(pages):
    files = (ROOT / "dpteach" / "README.md", ROOT / "notebooks" / "GLOSSARY.md")
    anchors = {f: {pages.anchor(h) for h in re.findall(r"^#+ (.*)$", f.read_text("utf-8"), re.M)} for f in files}
    broken = []
    for file in files:
        for target in re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
            path, _, place = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            if not target.startswith("https://") and not (
                there.exists() and (not place or place in anchors.get(there, ()))
            ):
                broken.append(f"{file.name}: {target}")
    assert broken == []


def test_no_heading_has_the_address_of_another_one(pages):
    headings = [pages.anchor(h) for h in re.findall(r"^#+ (.*)$", pages.api(), re.M)]
    assert len(set(headings)) == len(headings)


def thing(code):
    """What a term is called in code: ``dpteach.epsilon``, or ``dpteach.epsilon:steps`` for an argument of it."""
    path, _, argument = code.partition(":")
    module, *names = path.split(".")
    found = importlib.import_module(module)
    for k, name in enumerate(names):
        if not hasattr(found, name):
            importlib.import_module(".".join([module, *names[: k + 1]]))
        found = getattr(found, name)
    return inspect.signature(found).parameters[argument] if argument else found


def test_what_the_glossary_calls_code_is_there(pages):
    missing = []
    for term in pages.terms()["term"]:
        for code in term.get("code", ()):
            try:
                thing(code)
            except (AttributeError, KeyError, ImportError):
                missing.append(f"{term['term']}: {code}")
    assert missing == []


def words_of(path):
    """A notebook's text, without the names of notebooks: ``02_clipping`` does not speak of clipping."""
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells)
    text = re.sub(r"(?s)\*\*Read on\*\*.*$", "", text)  # whose titles may say more
    return (
        re.sub(r"\d\db?_\w+", "", text)
        .replace(r"\sigma", "σ")
        .replace(r"\varepsilon", "ε")
        .replace(r"\eta", "η")
        .replace(r"\mu", "μ")
    )


def test_a_word_stands_in_the_notebook_that_explains_it_and_a_letter_in_none_before(pages):
    texts = {pages.number(path): words_of(path) for path in NOTEBOOKS}
    wrong = []
    for term in pages.terms()["term"]:
        if not re.search(term.get("find", re.escape(term["term"])), texts[term["notebook"]]):
            wrong.append(f"{term['term']} is not in notebook {term['notebook']}")
        if "symbol" in term:
            letter = re.compile(rf"(?<![A-Za-z_'\"]){re.escape(term['symbol'])}(?![A-Za-z_'\"(])")
            first = next(number for number, text in texts.items() if letter.search(text))
            if first != term.get("named", term["notebook"]):
                wrong.append(f"{term['symbol']} ({term['term']}) is first in notebook {first}")
    assert wrong == []


def test_the_glossary_names_each_term_once_and_in_few_words(pages):
    content = pages.terms()
    names = [term["term"] for term in content["term"]]
    assert len(set(names)) == len(names) > 35
    assert [t["term"] for t in content["term"] if t["meaning"].count(". ") > 3 or not t["meaning"].endswith(".")] == []
