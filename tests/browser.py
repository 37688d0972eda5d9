"""Open a page in a headless Chromium and list what is wrong with it: ``python tests/browser.py PAGE``.

Needs ``pip install playwright`` and a Chromium on the path; nothing is downloaded.
"""

from __future__ import annotations  # playwright's types are named below, and may not be there

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1280, 400)  # pixels: a desk, a telephone
SCHEMES = ("light", "dark")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# contrast as defined by the W3C's accessibility guidelines 2.2, which ask for 4.5
_SCRIPT = """
() => {
  const problems = [];
  const all = selector => [...document.querySelectorAll(selector)];
  const name = e => e.outerHTML.slice(0, 60) + ' … ' + e.textContent.trim().slice(0, 40);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) problems.push(`wider than the window: ${root.scrollWidth} pixels`);
  if (!document.body.innerText.trim()) problems.push('no text');

  for (const picture of all('img, svg')) {
    const box = picture.getBoundingClientRect();
    if (box.width < 1 || box.height < 1) problems.push(`picture without size: ${name(picture)}`);
    if (picture.localName === 'img' && !picture.naturalWidth) problems.push(`picture not loaded: ${name(picture)}`);
    if (!(picture.getAttribute('alt') || picture.getAttribute('aria-label')))
      problems.push(`picture without words: ${name(picture)}`);
  }

  const levels = all('h1, h2, h3, h4, h5, h6').map(heading => Number(heading.localName[1]));
  if (levels.filter(level => level === 1).length !== 1) problems.push('not exactly one h1');
  if (levels.some((level, i) => level > (i ? levels[i - 1] : 0) + 1)) problems.push(`headings leap: ${levels}`);

  const ids = all('[id]').map(e => e.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) problems.push(`id used twice: ${id}`);
  for (const link of all('a[href^="#"]'))
    if (!document.getElementById(link.getAttribute('href').slice(1))) problems.push(`leads nowhere: ${name(link)}`);
  for (const cell of all('thead th'))
    if (cell.getAttribute('scope') !== 'col') problems.push(`column title without scope: ${name(cell)}`);

  const rgba = colour => { const p = colour.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const probe = document.body.appendChild(document.createElement('i'));
  probe.style.backgroundColor = 'Canvas'; // what the browser paints where the page paints nothing
  const canvas = rgba(getComputedStyle(probe).backgroundColor);
  probe.remove();
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return canvas;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(e) || e.closest('svg, script, style')) continue;
    seen.add(e);
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) problems.push(`contrast ${contrast.toFixed(1)}: ${name(e)}`);
  }

  for (const table of all('#verdicts table'))
    for (const row of table.tBodies[0].rows)
      for (const cell of row.cells) {
        const box = cell.getBoundingClientRect();
        const style = getComputedStyle(cell);
        const cut = box.left < 0 || box.right > innerWidth + 1 || cell.scrollWidth > cell.clientWidth + 1;
        const small = parseFloat(style.fontSize) < 12 || box.height < 12 || style.visibility !== 'visible';
        if (!cell.innerText.trim() || cut || small) problems.push(`verdict not readable: ${name(cell)}`);
      }
  return problems;
}
"""


def missing() -> str | None:
    """What this machine lacks for a check, in words; None where nothing is."""
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install 'ddpnopt[browser]'"
    return None if _chromium() else f"no browser on the path: install one of {', '.join(NAMES)}"


def check_page(path: Path, browser: Browser | None = None) -> list[str]:
    """Open a file in both widths and colour schemes, with and without network; return what is wrong, in words.

    Wrong is: a message of the console or an error, any request but for the file itself, a page wider than its window,
    a picture without size or description, skipped headings, doubled ids, dead links within the page, too little
    contrast, and a table of verdicts (in ``#verdicts``) that cannot be read. Without ``browser`` one is launched.

    Raises:
        ValueError: there is no such file, or the machine lacks what :func:`missing` names.
    """
    lack = missing()
    if lack is not None:
        raise ValueError(lack)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name the page to be checked")
    with nullcontext(browser) if browser else launched() as opened:
        return list(dict.fromkeys(_problems(opened, path.resolve().as_uri())))


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=list(OPTIONS))
        try:
            yield browser
        finally:
            browser.close()


def _chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


def _problems(browser: Browser, address: str) -> Iterator[str]:
    for width, scheme, offline in product(WIDTHS, SCHEMES, (False, True)):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
            offline=offline,
        )
        page = context.new_page()
        said = _listen(page, address)
        page.goto(address, wait_until="load")
        where = f"{width} pixels, {scheme}{', no network' * offline}"
        found = page.evaluate(_SCRIPT)
        yield from (f"{problem} ({where})" for problem in [*said, *found])
        context.close()


def _listen(page: Page, address: str) -> list[str]:
    said: list[str] = []
    page.on("console", lambda message: said.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda one: None if one.url == address else said.append(f"request: {one.url[:100]}"))
    return said


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("name the pages to be checked: python tests/browser.py PAGE ...")
    found = [f"{name}: {problem}" for name in sys.argv[1:] for problem in check_page(Path(name))]
    print("\n".join(found) or "no problem found")
    sys.exit(bool(found))
