"""The documentation's site: it is built, its links and anchors lead somewhere, and a browser shows each page.

Skipped without mkdocs-material (the extra "docs"), and what needs a browser without playwright (the extra "site") or
Chromium.
"""
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
WIDTHS = {'desktop': 1280, 'telephone': 390}
# Returns what is wider than the window, unless it scrolls inside something that is not.
TOO_WIDE = '''() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    return [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > width + 1)
        .slice(0, 3).map(e => e.outerHTML.slice(0, 120)).concat([`${document.documentElement.scrollWidth} px`]);
}'''
EMPTY_PICTURES = '() => [...document.images].filter(e => !(e.complete && e.naturalWidth)).map(e => e.src)'

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The links, sources and anchors of a page, and its pictures without a text."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.silent = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ('id', 'name') if attributes.get(key)}
        # <link rel="canonical"> and the like name a page, they load none.
        if not (tag == 'link' and attributes.get('rel') in ('canonical', 'prev', 'next')):
            self.links += [attributes[key] for key in ('href', 'src') if attributes.get(key)]
        if tag == 'img' and not attributes.get('alt'):
            self.silent.append(attributes.get('src'))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('material', reason='mkdocs-material is not installed')
    pytest.importorskip('mkdocstrings', reason='mkdocstrings is not installed')
    folder = tmp_path_factory.mktemp('site')
    built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(folder)],
                           cwd=ROOT, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope='module')
def pages(site):
    return read_pages(site)


@contextmanager
def served(folder: Path):
    """Serves a folder on loopback; gives the address."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip('there is no Chromium')
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=['--no-sandbox'])
        yield browser
        browser.close()


def faults_of(browser, folder: Path, pages: list[str], width: int) -> list[str]:
    """Open pages one after another; return failed requests, those to other hosts, errors, and what is too wide."""
    faults = []

    def failed(request):
        # A favicon may still be under way when the next page is opened. Whether it exists is the links' test.
        if request.failure != 'net::ERR_ABORTED':
            faults.append(f'{window.url} failed: {request.url}')

    context = browser.new_context(viewport={'width': width, 'height': 800})
    with served(folder) as address:
        context.route(lambda url: not url.startswith((address, 'data:', 'blob:')), lambda route: route.abort())
        window = context.new_page()
        window.set_default_timeout(120_000)
        window.on('requestfailed', failed)
        window.on('response', lambda response: response.status >= 400 and faults.append(
            f'{window.url} {response.status}: {response.url}'))
        window.on('console', lambda message: message.type == 'error' and faults.append(
            f'{window.url} says: {message.text}'))
        window.on('pageerror', lambda error: faults.append(f'{window.url} raised: {error}'))
        for page in pages:
            window.goto(address + page, wait_until='networkidle')
            faults += [f'{page} is too wide: {found}' for found in window.evaluate(TOO_WIDE)]
            faults += [f'{page} does not show {source}' for source in window.evaluate(EMPTY_PICTURES)]
        context.close()
    return faults


def read_pages(folder: Path) -> dict[str, Page]:
    """Return the pages of a site, by their addresses."""
    return {f'/{file.relative_to(folder).as_posix()}'.removesuffix('index.html'):
            Page(file.read_text(encoding='utf-8')) for file in sorted(folder.rglob('*.html'))}


def lost_links(folder: Path, pages: dict[str, Page]) -> list[str]:
    """Return the links that lead nowhere: no such file, no such anchor, or to a host by anything but https."""
    lost = []
    for address, page in pages.items():
        for link in page.links if address != '/404.html' else ():  # its links begin with the site's own address
            target = urlsplit(urljoin(address, link))
            if target.scheme:
                found = target.scheme in ('https', 'data')
            elif target.path in pages:
                found = not target.fragment or unquote(target.fragment) in pages[target.path].anchors
            else:
                found = (folder / unquote(target.path).lstrip('/')).is_file()
            if not found:
                lost.append(f'{address} links to {link}')
    return lost


def test_links_and_anchors_lead_somewhere(site, pages):
    lost = lost_links(site, pages)
    assert not lost, '\n'.join(lost)


def test_lost_links_are_found(tmp_path):
    (tmp_path / 'guide').mkdir()
    (tmp_path / 'picture.png').touch()
    (tmp_path / 'index.html').write_text('''<a href="guide/#here"></a><a href="guide/#there"></a><img src="picture.png">
        <img src="other.png"><a href="http://example.com"></a><a href="https://example.com"></a>''')
    (tmp_path / 'guide' / 'index.html').write_text('<h2 id="here"></h2><a href="..">home</a><a href="../no/">no</a>')
    pages = read_pages(tmp_path)
    assert lost_links(tmp_path, pages) == ['/guide/ links to ../no/', '/ links to guide/#there',
                                           '/ links to other.png', '/ links to http://example.com']
    assert pages['/'].silent == ['picture.png', 'other.png'] and not pages['/guide/'].silent


def test_pictures_have_a_text(pages):
    assert not {address: page.silent for address, page in pages.items() if page.silent}


@pytest.mark.parametrize('width', WIDTHS.values(), ids=WIDTHS)
def test_browser_shows_each_page(site, pages, browser, width):
    opened = [page for page in pages if page != '/404.html']
    faults = faults_of(browser, site, opened, width)
    assert len(opened) > 20 and not faults, '\n'.join(faults)


def test_the_browser_finds_faults(browser, tmp_path):
    (tmp_path / 'index.html').write_text('''<!doctype html><meta name="viewport" content="width=device-width">
        <link rel="icon" href="data:,"><article><div style="width: 600px">wide</div></article>
        <img src="missing.png"><script src="https://example.com/script.js"></script>
        <script>console.error('of the console'); throw new Error('of the script')</script>''')
    wide, narrow = (faults_of(browser, tmp_path, ['/'], width) for width in (1280, 390))
    for said in ('404: ', 'failed: https://example.com/script.js', 'says: of the console', 'raised: of the script',
                 'does not show '):
        assert any(said in fault for fault in wide) and any(said in fault for fault in narrow), said
    assert not any('too wide' in fault for fault in wide) and any('too wide: <div' in fault for fault in narrow)
