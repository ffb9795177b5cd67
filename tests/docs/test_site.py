"""The site is built strictly; nothing in it is broken, missing, loaded from elsewhere or hard to read."""

from __future__ import annotations

import doctest
import functools
import http.server
import importlib
import json
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.patience import HANG_S
from tests.report.chromium import Browser
from tests.report.colors import contrast, luminance

ROOT = Path(__file__).resolve().parents[2]
#: Packages whose names the API's page lists; `__version__` has nothing to say.
PUBLIC = ("evenmoe", "evenmoe.formats", "evenmoe.report", "evenmoe.integrations.transformers")
#: One page of each kind: pictures, prose, wide code, wide tables, docstrings.
SHOWN = ("index", "concepts", "launch", "json", "reference")
WIDTHS = (400, 1600)


class Reader(HTMLParser):
    """What a page refers to, what of it a browser would load at once, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.anchors.add(known.get("id", ""))
        target = known.get("src") or known.get("href")
        if target is not None:
            (self.targets if tag == "a" else self.loaded).append(target)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="this machine lacks mkdocs, whose plug-ins need Python 3.11")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def broken_references(site: Path) -> list[str]:
    """References of pages that lead nowhere within the site, and what they would load from other hosts."""
    files = [path.resolve() for path in site.rglob("*.html") if path.name != "404.html"]
    pages = {path: Reader(path.read_text("utf-8")) for path in files}
    found = []
    for path, page in pages.items():
        found += [f"{path.name} loads {one}" for one in page.loaded if urlsplit(one).netloc]
        for target in [*page.targets, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            lost = parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].anchors
            if lost or not to.is_file():
                found.append(f"{path.name}: {target}")
    return sorted(set(found))


def test_every_reference_leads_somewhere(site):
    assert broken_references(site) == []
    assert len(list(site.glob("*.html"))) > 20


def test_a_broken_reference_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html"></a><a href="#c"></a><a id="d" href="#d"></a><img src="https://example.invalid/e.png">'
    )
    assert broken_references(tmp_path) == ["a.html loads https://example.invalid/e.png", "a.html: #c", "a.html: b.html"]


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_entry(site, package):
    if package.endswith("transformers"):
        pytest.importorskip("transformers", reason="this machine lacks transformers")
    names = {f"{package}.{name}" for name in importlib.import_module(package).__all__} - {"evenmoe.__version__"}
    assert len(names) > 1
    assert names <= Reader((site / "reference.html").read_text("utf-8")).anchors


def test_doctests_of_docstrings_are_shown_as_code(site):
    page = (site / "reference.html").read_text("utf-8")
    assert "<blockquote" not in page
    assert page.count('class="gp">&gt;&gt;&gt;') > 30


def test_the_examples_of_the_hooks():
    pytest.importorskip("mkdocs", reason="this machine lacks mkdocs, whose plug-ins need Python 3.11")
    done = doctest.testmod(importlib.import_module("tools.docs_site"))
    assert (done.failed, done.attempted) == (0, 2)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = {page for group in yaml.safe_load(text)["nav"] for page in _pages(group)}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named


def _pages(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _pages(part)]


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("page", SHOWN)
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_in_a_browser(browser, address, page, mode, width):
    browser.open(f"{address}/{page}.html", width, mode)
    assert browser.console() == []
    asked = [one for one in browser.requests() if one.startswith("http")]
    assert asked
    assert [one for one in asked if not one.startswith(address + "/")] == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    pairs = browser.run(
        """
        const walk = document.createTreeWalker(document.querySelector('.md-content'), NodeFilter.SHOW_TEXT);
        const pairs = {};
        while (walk.nextNode()) {
            const node = walk.currentNode.parentElement;
            if (!walk.currentNode.data.trim() || !node.getClientRects().length) continue;
            if (node.closest('svg, .headerlink')) continue;
            const clear = one => getComputedStyle(one).backgroundColor == 'rgba(0, 0, 0, 0)';
            let behind = node;
            while (behind && clear(behind)) behind = behind.parentElement;
            const paper = getComputedStyle(behind || document.body).backgroundColor;
            pairs[getComputedStyle(node).color + '|' + paper] = walk.currentNode.data.slice(0, 40);
        }
        return pairs;
        """
    )
    assert len(pairs) >= 2
    low = {pair: text for pair, text in pairs.items() if contrast(*pair.split("|")) < 4.5}
    assert low == {}, json.dumps(low)
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) < 0.1) == (mode == "dark")
