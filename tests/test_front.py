"""The front door: what somebody finds who has not yet opened a notebook."""

import re
from pathlib import Path

import nbformat
import pytest

import dpteach

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/README.md", "tests/README.md"]


def text(page) -> str:
    return (ROOT / page).read_text(encoding="utf8")


def prose(page) -> str:
    """A page without its code, where a bracket is no link."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text(page), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What can stand after # in a link: a title as GitHub writes it; in a notebook, a title with - for each space."""
    if path.suffix == ".ipynb":
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
        return {h.replace(" ", "-") for c in cells for h in re.findall(r"^#+ (.*)$", c, re.MULTILINE)}
    page = re.sub(r"```.*?```", "", path.read_text(encoding="utf8"), flags=re.DOTALL)
    titles = [
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    ]
    return set(titles)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(page))
    here = [t for t in targets if not t.startswith(("https://", "mailto:"))]
    dead = []
    for target in here:
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert here and dead == []


def test_the_readme_is_read_in_a_minute_and_its_picture_is_soon_there():
    assert len(text("README.md").splitlines()) <= 80
    pictures = [ROOT / name for name in re.findall(r"!\[[^\]]+\]\((\.github/[^)]+)\)", text("README.md"))]
    assert [p.name for p in pictures if p.stat().st_size > 3_000_000] == [] and pictures


def test_no_picture_is_left_that_no_page_shows():
    kept = [p.name for p in (ROOT / ".github").iterdir() if p.suffix in (".png", ".gif", ".webp")]
    assert [name for name in kept if not any(f".github/{name}" in text(page) for page in PAGES)] == []


def test_each_number_among_the_readmes_findings_is_printed_by_the_notebook_that_it_links():
    findings = re.findall(
        r"^- (?:.|\n(?!\n|- ))+", text("README.md").split("## Measured here")[1].split("\n## ")[0], re.M
    )
    assert len(findings) >= 2
    for finding in findings:
        (notebook,) = re.findall(r"\((notebooks/\w+\.ipynb)", finding)
        cells = nbformat.read(ROOT / notebook, as_version=4).cells
        printed = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
        numbers = re.findall(r"\d+\.\d+|\b\d\d\b", finding.partition("[Notebook")[0].replace("in 20 Minutes", ""))
        assert numbers and [n for n in numbers if n not in re.findall(r"\d+(?:\.\d+)?", printed)] == [], finding


def test_the_readme_has_its_two_commands_each_alone_in_a_block():
    blocks = re.findall(r"```bash\n(.*?)\n```", text("README.md"), re.DOTALL)
    begin = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert blocks == [begin + "jupyter lab notebooks/", begin + "pytest --nbval notebooks/ tests/"]


def test_citation_and_changelog_name_the_version_of_the_package():
    assert re.findall(r"^version: (.+)$", text("CITATION.cff"), re.MULTILINE) == [dpteach.__version__]
    editions = re.findall(r"^## \[(\d.+?)\] - \d{4}-\d\d-\d\d$", text("CHANGELOG.md"), re.MULTILINE)
    assert editions[0] == dpteach.__version__
