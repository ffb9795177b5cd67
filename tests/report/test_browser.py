"""The page in Chromium: silent, on its own, readable on a phone, on a wide screen, in the dark and on paper."""

from __future__ import annotations

import re
import sys

import pytest

from evenmoe.report import write_report
from tests.report.chromium import Browser
from tests.report.colors import contrast, luminance
from tests.report.replays import make_replay

NASTY = '<script>document.title="owned"</script><img src="http://example.com/x.png" onerror="alert(1)">'
PAGES = {
    "usual": {},
    "tiny": {"steps": 1, "layers": 1, "ranks": 1, "experts": 1, "policies": ("identity",), "nodes": 1},
    "long": {"policies": ("identity", "Wide" * 75, "a " * 150, NASTY), "trace": "x" * 400, "layers": 2},
    "wide": {"steps": 300, "layers": 12, "ranks": 64, "experts": 64, "policies": tuple("ABCDEFGH"), "nodes": 8},
}
WIDTHS = (400, 1600)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, sizes in PAGES.items():
        command = f"evenmoe report {NASTY if name == 'long' else 'replay.sim'} -o {'o' * 300}.html"
        write_report(make_replay(**sizes), folder / f"{name}.html", command, {f"/{'d/' * 200}a": "0f" * 32})
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_said_and_nothing_leaves_the_file(browser, pages, page):
    path = pages / f"{page}.html"
    browser.open(path)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.console() == []
    assert browser.requests() == [path.as_uri()]
    assert "owned" not in browser.run("return document.title").split(":")[0]


def test_the_log_would_show_a_request_and_an_error(browser, tmp_path):
    """The check above can fail: a page without a policy asks, one with it complains that it may not."""
    page = tmp_path / "page.html"
    page.write_text('<img src="https://example.invalid/a.png"><script>console.error("loud")</script>')
    browser.open(page)
    assert "https://example.invalid/a.png" in browser.requests()
    assert any("loud" in line for line in browser.console())
    page.write_text(
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><script>console.error(1)</script>'
    )
    browser.open(page)
    assert any("Content Security Policy" in line for line in browser.console())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_wider_than_the_window(browser, pages, page, width):
    browser.open(pages / f"{page}.html", width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") == width
    outside = browser.run(
        """
        const cut = node => node.closest('.scroll, pre');
        return [...document.querySelectorAll('body *')].filter(node => !cut(node) || node.matches('.scroll, pre'))
            .filter(node => node.getBoundingClientRect().width && node.getBoundingClientRect().right > innerWidth + 1)
            .map(node => node.outerHTML.slice(0, 120));
        """
    )
    assert outside == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_no_text_is_smaller_than_12_px(browser, pages, page, width):
    """Text in drawings counts as it is drawn: font size × the scale from its units to the screen's."""
    browser.open(pages / f"{page}.html", width)
    sizes = browser.run(
        """
        document.querySelectorAll('details').forEach(d => d.open = true);
        const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
        while (walk.nextNode()) {
            const node = walk.currentNode.parentElement;
            if (!walk.currentNode.data.trim() || node.closest('title, desc')) continue;
            const matrix = node.getScreenCTM ? node.getScreenCTM() : {a: 1, d: 1};
            const size = parseFloat(getComputedStyle(node).fontSize) * Math.min(matrix.a, matrix.d);
            found[size.toFixed(2)] = walk.currentNode.data.slice(0, 40);
        }
        return found;
        """
    )
    assert len(sizes) > 3
    assert min(map(float, sizes)) >= 12, sizes


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_labels_of_drawings_do_not_overlap(browser, pages, page, width):
    browser.open(pages / f"{page}.html", width)
    overlaps = browser.run(
        """
        const bad = [];
        for (const svg of document.querySelectorAll('svg.plot')) {
            const boxes = [...svg.querySelectorAll('text')].filter(t => t.getClientRects().length)
                .map(t => [t.textContent, t.getBoundingClientRect()]);
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
                const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
                const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
                if (across > 0 && down > 3) bad.push([svg.querySelector('title').textContent, a, b, across, down]);
            }));
        }
        return bad;
        """
    )
    assert overlaps == []


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_words(browser, pages, page):
    """As the browser's own accessibility tree names them, not only as the markup says."""
    browser.open(pages / f"{page}.html")
    browser.cdp("Accessibility.enable")
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]
    drawings = browser.run("return document.querySelectorAll('figure svg[role=img]').length")
    assert drawings == browser.run("return document.querySelectorAll('figure').length") > 2
    assert len(images) == drawings
    names = [node["name"]["value"] for node in images]
    assert all(len(name) > 20 for name in names)
    assert len(set(names)) == len(names)
    assert browser.run("return document.querySelectorAll('figure:not(:has(> figcaption))').length") == 0


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_of_all_text(browser, pages, mode):
    """WCAG 2.1, 1.4.3: at least 4.5 : 1 against what is behind it, in both modes."""
    browser.open(pages / "wide.html", mode=mode)
    pairs = browser.run(
        """
        document.querySelectorAll('details').forEach(d => d.open = true);
        const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), pairs = {};
        while (walk.nextNode()) {
            const node = walk.currentNode.parentElement;
            if (!walk.currentNode.data.trim() || node.closest('title, desc')) continue;
            const style = getComputedStyle(node), front = node.closest('svg') ? style.fill : style.color;
            let behind = node;
            while (getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            pairs[front + '|' + getComputedStyle(behind).backgroundColor] = walk.currentNode.data.slice(0, 40);
        }
        return pairs;
        """
    )
    assert len(pairs) >= 5
    for pair, text in pairs.items():
        assert contrast(*pair.split("|")) >= 4.5, (pair, text)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.1) == (mode == "dark")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_lines_stand_out_from_the_paper(browser, pages, mode):
    """WCAG 2.1, 1.4.11: at least 3 : 1 for what is needed to understand a drawing."""
    browser.open(pages / "wide.html", mode=mode)
    paper = browser.run("return getComputedStyle(document.querySelector('figure')).backgroundColor")
    colours = browser.run("return [...document.querySelectorAll('.plot .line')].map(l => getComputedStyle(l).stroke)")
    assert len(set(colours)) == 4  # the baseline, the headline's, the best with a rule of engines; all others are gray
    assert all(contrast(colour, paper) >= 3 for colour in colours)


def test_print(browser, pages):
    """On paper: several pages, in light colours even from a dark screen, nothing cut off on the right."""
    browser.open(pages / "usual.html", mode="dark")
    document = browser.pdf()
    assert document.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) >= 3
    browser.cdp("Emulation.setEmulatedMedia", media="print")
    browser.cdp("Emulation.setDeviceMetricsOverride", width=690, height=1000, deviceScaleFactor=1, mobile=False)
    assert luminance(browser.run("return getComputedStyle(document.body).backgroundColor")) == 1.0
    assert browser.run("return document.documentElement.scrollWidth") == 690  # A4 less 2 × 14 mm at 96 px per inch
    browser.cdp("Emulation.setEmulatedMedia", media="")


def test_contrast_of_known_pairs():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21, abs=16 * sys.float_info.epsilon * 21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)
