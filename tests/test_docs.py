"""The documentation site: it builds without a warning, its links lead somewhere, its reference leaves nothing out."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from scaling_ray.cli import build_parser
from scaling_ray.results.columns import COLUMNS
from scaling_ray.specs.annotated import ABOUT_KEYS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
FLAGS = ("--quiet", "--nitpicky", "--fail-on-warning", "--keep-going", "-b", "html")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The build of ``make docs``, without a network: a proxy that is not there takes every request."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *FLAGS, str(source), str(out)],
        cwd=REPOSITORY,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.add(value)


def read_page(path: Path) -> _Links:
    found = _Links()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def dead_links(site: Path) -> Iterator[str]:
    """One line for each link of a page to a file or an anchor that the site does not have."""
    pages = {path: read_page(path) for path in site.rglob("*.html") if "reports" not in path.relative_to(site).parts}
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                yield f"{page.relative_to(site)}: {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{page.relative_to(site)}: {link} has no such anchor"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_local_link_and_anchor_is_there(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert list(dead_links(site)) == []


def test_a_dead_link_and_a_dead_anchor_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#top">b</a><a href="#top">a</a>')
    (tmp_path / "b.html").write_text('<a href="a.html#top">a</a><a href="c.html">c</a><a href="https://x.org/y">y</a>')
    assert list(dead_links(tmp_path)) in (
        ["a.html: b.html#top has no such anchor", "b.html: c.html"],
        ["b.html: c.html", "a.html: b.html#top has no such anchor"],
    )


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("[nowhere](missing.md)\n", "missing"),
        ("[no such heading](index.md#there)\n", "there"),
        ("```{ran}\nscaling-ray plan no-such-spec\n```\n", "no-such-spec"),
        ("```{eval-rst}\n.. autofunction:: scaling_ray.spec.no_such\n```\n", "no_such"),
    ],
)
def test_a_planted_fault_fails_the_build(tmp_path: Path, page: str, complaint: str) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text(
        f"import sys\nsys.path[:0] = [{str(DOCS)!r}, {str(REPOSITORY)!r}]\n"
        "extensions = ['myst_parser', 'sphinx.ext.autodoc', 'ran']\nmyst_heading_anchors = 3\n"
    )
    (source / "index.md").write_text(f"# A page\n\n{page}")
    done = build(source, tmp_path / "out")
    assert done.returncode != 0 and complaint in done.stderr + done.stdout


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every verb that can be called."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for child in action.choices.values():
            yield from leaves(child)


def test_the_reference_leaves_nothing_out(site: Path) -> None:
    spec = (site / "reference" / "spec.html").read_text()
    for table, keys in ABOUT_KEYS.items():
        for key in keys:
            assert f">{key}</span></code>" in spec, f"{table}.{key}"
    files = (site / "reference" / "files.html").read_text()
    for column in COLUMNS:
        assert f">{column.name}</span></code>" in files, column.name
    verbs = (site / "reference" / "verbs.html").read_text()
    flags = {flag for verb in leaves(build_parser()) for action in verb._actions for flag in action.option_strings}
    assert len(flags) > 50
    for flag in flags - {"-h", "--help"}:
        assert f">{flag}<" in verbs or f">{flag},<" in verbs, flag
    for verb in leaves(build_parser()):
        assert f'id="{verb.prog.replace(" ", "-")}"' in verbs, verb.prog


def test_every_kept_page_of_docs_is_part_of_the_site(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file(), page
    assert (site / "reports" / "real-bone-marrow" / "report.html").is_file()


def module_at(path: Path) -> ModuleType:
    """A script of docs/, imported by its path."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_of_the_readme_are_those_of_the_kept_tables(tmp_path: Path) -> None:
    drawing = module_at(DOCS / "draw.py")
    drawing.write_known_law(tmp_path / "known-law.csv")
    assert (tmp_path / "known-law.csv").read_bytes() == (DOCS / "tables" / "known-law.csv").read_bytes()
    assert drawing.answered() == (DOCS / "pictures" / "law-answered.svg").read_text()
    assert drawing.refused() == (DOCS / "pictures" / "law-refused.svg").read_text()
