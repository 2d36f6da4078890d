"""README and docs/: snippets run, excerpts of sources still stand there, tables and links are true.

In the Markdown, an HTML comment before a block says what it is:
    <!-- csrc/common/tile.h -->  an excerpt of that file, verbatim but for its indentation
    <!-- prints -->              what the Python block before it prints
"""

import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import slmkernels
from slmkernels import facts, nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
OPERATIONS = ("sliding_window_attention", "linear_attention", "hybrid_attention", "causal_conv1d", "experts")
SECTIONS = ("Maths", "Use", "Shapes and dtypes", "Backends", "Numerics", "Performance", "References")
OPTIONAL = ("transformers",)  # packages that a page may be about
BLOCK = re.compile(r"(?:^<!-- (?P<note>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
VARIABLE = re.compile(r"SLMKERNELS_[A-Z]\w*")


class Block(NamedTuple):
    """A fenced block of a page."""

    note: str  # of the comment before it
    kind: str
    text: str
    line: int  # where its text begins


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(x["note"] or "", x["kind"], x["text"], text.count("\n", 0, x.start("text")) + 1)
        for x in BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its blocks and inline code."""
    return re.sub(r"`[^`]*`", "", BLOCK.sub("", page.read_text()))


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each([page for page in PAGES if any(block.kind == "python" for block in blocks(page))])
def test_snippets_run(page, one_thread, tmp_path, monkeypatch, capsys):
    """Block after block in one namespace, in a folder of their own."""
    found = blocks(page)
    for name in OPTIONAL:
        if any(re.search(rf"^\s*(import|from) {name}\b", x.text, re.M) for x in found if x.kind == "python"):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "snippets"}
    for block in found:
        if block.kind == "python":
            capsys.readouterr()
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        elif block.note == "prints":
            assert capsys.readouterr().out == block.text


@each(PAGES)
def test_excerpts_stand_in_their_files(page):
    for block in blocks(page):
        if block.kind != "cpp":
            continue
        assert block.note, f"line {block.line}: an excerpt of which file?"
        lines, excerpt = (ROOT / block.note).read_text().splitlines(), textwrap.dedent(block.text)
        n = block.text.count("\n")
        windows = ("\n".join(lines[i : i + n]) + "\n" for i in range(len(lines) - n + 1))
        stands = any(textwrap.dedent(window) == excerpt for window in windows)
        assert stands, f"line {block.line}: not in {block.note}:\n{block.text}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        twins = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", x) is not None for x in found)
        found.append(f"{slug}-{twins}" if twins else slug)
    return set(found)


@each(LINKED)
def test_links_and_images_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("name", OPERATIONS)
def test_pages_of_operations_say_what_is_promised(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    places = [headings.index(section) for section in SECTIONS]
    assert all(a < b for a, b in pairwise(places))
    assert facts.NOT_YET_RUN in " ".join(text.split())


def test_public_names_are_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    for module in (slmkernels, nn):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", text), f"{module.__name__}.{name}"


def test_variables_of_the_environment_are_all_in_the_table():
    """And the table has no others."""
    sources = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("*.py")]
    for folder in ("slmkernels", "csrc", "tests", "benchmarks"):
        sources += [x for x in (ROOT / folder).rglob("*") if x.suffix in {".py", ".h", ".cpp", ".inl", ".cu"}]
    used = {name for path in sources if path.exists() for name in VARIABLE.findall(path.read_text())}
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(rows) == len(set(rows))
    assert used == {name for name in rows if VARIABLE.fullmatch(name)}
