"""The documentation in a browser: no page is wider than the screen, no script fails, search works.

Needs playwright and a Chromium: the one that CHROMIUM names, or that is on the path.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

pytest.importorskip("mkdocs")
api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the path", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
# What sticks out of the page and is in no box that scrolls.
WIDE = """() => [...document.querySelectorAll('.md-content *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let box = e.parentElement; box; box = box.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) return false;
  return true;
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of the built site, and its pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True)
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(p.parent.relative_to(folder) for p in folder.rglob("index.html"))
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


@pytest.fixture(scope="module", params=SCREENS)
def page(request, site):
    width, height = SCREENS[request.param]
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": width, "height": height})
        # Nothing but the site itself: stars of the repository stay out.
        page.route(lambda url: not url.startswith(site[0]), lambda route: route.abort())
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def test_every_page_fits_the_screen(page, site):
    address, pages = site
    assert len(pages) > 50
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for path in pages:
        page.goto(f"{address}/{path}/", wait_until="load")
        wide = page.evaluate(WIDE)
        assert not wide, f"{path}: {wide[:3]}"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert page.inner_text("h1").strip(), path
    assert not errors


def test_search_finds_a_loss(page, site):
    page.goto(site[0] + "/")
    if page.viewport_size["width"] < 1000:
        page.click("label.md-header__button[for=__search]")
    page.click(".md-search__input")
    page.keyboard.type("rank_sort_loss", delay=30)
    first = page.wait_for_selector(".md-search-result__item a")
    assert "/losses/rank_sort_loss/" in first.get_attribute("href")
