"""Check the map of folders in CONTRIBUTING.md, the size of folders and modules, and the links between pages."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cspine_data", "cspine_train")
MOST_FILES = 13
MOST_LINES = 400

ROW = re.compile(r"^\| `([\w/]+)/` \| (.+) \| (.+) \|$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def folders_of_the_map() -> dict[str, list[str]]:
    rows = ROW.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len({folder for folder, *_ in rows}) == len(rows)
    return {folder: re.findall(r"`(\w+)`", modules) for folder, _question, modules in rows}


def folders_of_the_packages() -> list[Path]:
    return sorted({path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")})


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"])


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_lists_every_folder() -> None:
    assert set(folders_of_the_map()) == {str(folder.relative_to(ROOT)) for folder in folders_of_the_packages()}


def test_the_map_names_modules_that_exist() -> None:
    for folder, modules in folders_of_the_map().items():
        assert modules
        assert [name for name in modules if not (ROOT / folder / f"{name}.py").is_file()] == [], folder


@pytest.mark.parametrize("folder", folders_of_the_packages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_and_modules_are_small(folder: Path) -> None:
    modules = list(folder.glob("*.py"))
    assert len(modules) <= MOST_FILES
    assert [path.name for path in modules if len(path.read_text().splitlines()) > MOST_LINES] == []


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_pages_named_in_the_code_exist() -> None:
    sources = [path for folder in (*PACKAGES, "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"docs/[\w./-]+\.md", path.read_text())}
    assert named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py")]), ids=lambda path: path.name
)
def test_benchmarks_and_examples_import_what_there_is(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cspine_"):
            module = import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or import_module(f"{node.module}.{name.name}")
