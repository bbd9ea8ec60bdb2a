"""The search page, served by the real command: over HTTP as hostile clients speak it, and in a headless browser."""

from __future__ import annotations

import io
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import forked
from tests.search.browser import CHROMIUM, Browser
from tests.search.made import save_calibration, save_embeddings, save_model, save_pictures
from tests.search.test_search import HOSTILE, OUTSIDE, hostile
from train_clip import load

NUMBER = 40  # pictures
HAS_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="needs chromium, which .ci/run installs (apt install chromium)")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Served:
    """A command that serves a page, until it is stopped."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            command = ["-m", "train_clip.cli", "search", *map(str, words), "--page", "--port", "0", "--device", "cpu"]
            self.process = forked.start(command, stdout=log, stderr=log, cwd=folder)
        end = time.monotonic() + 240
        while not (found := re.search(r"Search page: (http://127\.0\.0\.1:(\d+)/)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.address, self.port = found[1], int(found[2])

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        got = connection.getresponse()
        answer = Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        connection.close()
        return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page of pictures and names that say nothing bad."""
    folder = tmp_path_factory.mktemp("page")
    model = save_model(folder / "model.safetensors")
    names = save_pictures(folder / "pictures", NUMBER)
    rows = load(model).encode([folder / "pictures" / name for name in names])
    captions = [f"a color, number {row}" for row in range(NUMBER)]
    file = save_embeddings(folder / "x.npz", model, rows, names, captions, folder / "pictures")
    one = Served(folder, file, "-k", "7")
    yield one
    one.process.terminate()


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page of embeddings whose captions are markup, and whose paths lead out of their folder."""
    folder = tmp_path_factory.mktemp("bad")
    save_model(folder / "model.safetensors")
    one = Served(folder, hostile(folder, folder), "-k", "99")
    yield one
    one.process.terminate()


def rows_in(answer: Answer) -> list[int]:
    return [*map(int, re.findall(rb'src="/thumbnail/(\d+)"', answer.body))]


def test_results_are_those_of_encode(served: Served) -> None:
    folder = served.log.parent
    model = load(folder / "model.safetensors")
    matrix = model.encode(sorted((folder / "pictures").iterdir()))
    for text in ("a red hat", "ü 🐱 <b>"):
        products = (matrix @ model.encode([text])[0]).tolist()
        answer = served.ask("/?q=" + "".join(f"%{byte:02x}" for byte in text.encode()))
        expected = sorted(range(NUMBER), key=lambda row: -products[row])[:7]
        assert rows_in(answer) == expected
        assert f"<b>{products[expected[0]]:.3f}</b> a color, number {expected[0]}".encode() in answer.body
    assert rows_in(served.ask("/?like=5"))[0] == 5 and b"More like key 005.png" in served.ask("/?like=5").body
    assert rows_in(served.ask("/")) == list(range(7)) == rows_in(served.ask("/?q=%20"))
    assert "40 embeddings of 16 numbers, compared one by one, which takes 3 kB of memory" in served.log.read_text()


def test_probabilities_and_that_nothing_fits(served: Served, tmp_path: Path) -> None:
    """For a text that is typed; pictures like another are not what was calibrated."""
    folder = served.log.parent
    path = save_calibration(tmp_path / "c.json", folder / "model.safetensors", 1.5)
    one = Served(tmp_path, folder / "x.npz", "--calibration", path)
    body = one.ask("/?q=a+red+hat").body.decode()
    similar = [float(found) for found in re.findall(r"<b>(-?[\d.]+)</b>", body)]
    shown = [float(found) / 100 for found in re.findall(r"</b> \((\d+)%\) a color", body)]
    np.testing.assert_allclose(shown, 1 / (1 + np.exp(6 - 8 * np.array(similar))), atol=0.006)
    assert "<h2>a red hat</h2>\n<p>nothing fits, with a precision of 90.0%</p>" in body and len(shown) == 12
    assert b"nothing fits" not in one.ask("/?like=5").body and b"%)" not in one.ask("/?like=5").body
    one.process.terminate()


def test_thumbnails_are_small_pictures(served: Served) -> None:
    answer = served.ask("/thumbnail/3")
    shown, original = Image.open(io.BytesIO(answer.body)), Image.open(served.log.parent / "pictures" / "003.png")
    assert answer.headers["content-type"] == "image/jpeg" and shown.size == (40, 30)
    assert np.abs(np.asarray(shown, float)[9, 9] - np.asarray(original, float)[9, 9]).max() < 9


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "0.0.0.0", ""])
def test_a_name_of_another_host_is_refused(host: str, served: Served) -> None:
    """As a page has it that lets its own name point here (DNS rebinding)."""
    for path in ("/", "/thumbnail/3"):
        assert served.ask(path, Host=host).status == 400
    assert served.ask("/", Host=f"localhost:{served.port}").status == 200


def test_other_origins_may_not_read(served: Served) -> None:
    for path in ("/", "/?q=a", "/thumbnail/3", "/?like=3"):
        headers = served.ask(path, Origin="http://evil.example").headers
        assert not [name for name in headers if name.startswith("access-control")]
        assert (
            headers["cross-origin-resource-policy"] == "same-origin" and headers["x-content-type-options"] == "nosniff"
        )
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
        assert "frame-ancestors 'none'" in policy
    assert served.ask("/", method="POST").status == served.ask("/", method="PUT").status == 405


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/thumbnail/40",
            "/thumbnail/-1",
            "/thumbnail/" + "9" * 5000,
            "/thumbnail/1.5",
            "/thumbnail/x",
            "/thumbnail/",
        ),
        *(
            "/etc/passwd",
            "/../x.npz",
            "/thumbnail/../x.npz",
            "/thumbnail/%2e%2e%2fx.npz",
            "//etc/passwd",
        ),
        *("/?like=40", "/?like=-1", "/?like=x", "/?like=" + "9" * 5000, "/?like=%C2%B2", "/pictures/000.png"),
    ],
)
def test_there_is_nothing_else(path: str, served: Served) -> None:
    assert served.ask(path).status == 404


def test_long_queries_are_cut(served: Served) -> None:
    assert served.ask("/?q=" + "a" * 5000).status == 200
    with suppress(ConnectionError):
        assert served.ask("/?q=" + "a" * 200_000).status >= 400
    assert served.ask("/?q=a").status == 200


def test_no_file_outside_the_folder_is_served(bad: Served) -> None:
    """Names that are absolute, climb, or are links that lead out, and what is no picture; links within are followed."""
    found = [bad.ask(f"/thumbnail/{row}").status for row in range(4 + len(OUTSIDE))]
    assert found == [200, 200, 200, *[404] * (1 + len(OUTSIDE))]
    assert "nowhere else" in bad.log.read_text()


def test_only_this_machine_is_listened_to(served: Served) -> None:
    """Its other addresses are not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no other address")
        address = out.getsockname()[0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, served.port), timeout=10)


def test_ctrl_c_ends_it_and_a_port_in_use_is_told(served: Served, tmp_path: Path) -> None:
    folder = served.log.parent
    words = [folder / "x.npz", "--page", "--port", served.port, "--device", "cpu"]
    ended = forked.run(["-m", "train_clip.cli", "search", *map(str, words)])
    assert ended.returncode == 1 and f"--port {served.port}: cannot be used" in ended.stderr
    other = Served(tmp_path, folder / "x.npz")
    assert other.ask("/").status == 200
    other.process.send_signal(signal.SIGINT)
    assert other.process.wait(30) == 130 and "Traceback" not in other.log.read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    one = Browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.close()


@HAS_CHROMIUM
def test_typing_shows_results(served: Served, browser: Browser) -> None:
    """Key by key, without Enter; then a picture is clicked; nothing comes from elsewhere."""
    browser.open(served.address)
    assert browser.value("document.activeElement.id") == "q"
    browser.type("a red hat")
    browser.until("document.querySelector('h2').textContent == 'a red hat'")
    rows = "[...document.querySelectorAll('ol img')].map(one => Number(one.src.split('/').pop()))"
    assert browser.value(rows) == rows_in(served.ask("/?q=a+red+hat"))
    assert browser.value("location.search") == "?q=a+red+hat"
    assert browser.value("document.querySelector('[role=status]').textContent") == "7 of 40, the most similar first"
    browser.until("[...document.images].every(one => one.complete && one.naturalWidth == 40)")
    similar = browser.value("[...document.querySelectorAll('ol b')].map(one => Number(one.textContent))")
    assert len(similar) == 7 and similar == sorted(similar, reverse=True)
    sources = browser.value("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)")
    assert {*sources} == {served.address.rstrip("/")}
    clicked = browser.value(f"{rows}[2]")
    browser.value("document.querySelectorAll('ol a')[2].click()")
    browser.until(f"document.querySelector('h2').textContent == 'More like key {clicked:03}.png'")
    assert browser.value(rows)[0] == clicked


@HAS_CHROMIUM
def test_by_keyboard_and_without_the_script(served: Served, browser: Browser) -> None:
    """Tab reaches the button and the pictures, which Enter follows; the form works by itself."""
    browser.open(served.address)
    browser.press("Tab", 9), browser.press("Tab", 9)
    assert browser.value("document.activeElement.title") == "More like this"
    browser.press("Enter", 13)
    browser.until("location.search == '?like=0'")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(served.address)
        browser.type("a hat")
        browser.press("Enter", 13)
        browser.until("location.search == '?q=a+hat' && document.readyState == 'complete'")
        assert browser.value("document.querySelector('h2').textContent") == "a hat"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


@HAS_CHROMIUM
def test_every_picture_and_field_has_a_name(served: Served, browser: Browser) -> None:
    """As a screen reader finds them; and text has the contrast that WCAG asks for (7 to 1), light and dark."""
    browser.call("Accessibility.enable")
    contrast = """(() => {
        const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255)
            .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
            .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
        const style = getComputedStyle(document.body), [a, b] = [light(style.color), light(style.backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    })()"""
    backgrounds = set()
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(served.address + "?q=hat")
        assert browser.value(contrast) >= 7
        backgrounds.add(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
    assert ("searchbox", "Search for") in named and ("button", "Search") in named
    pictures = [name for role, name in named if role == "image"]
    links = [name for role, name in named if role == "link"]
    assert len(pictures) == len(links) == 7 and all(name.startswith("a color, number") for name in [*pictures, *links])


@HAS_CHROMIUM
def test_a_hostile_caption_is_text(bad: Served, browser: Browser) -> None:
    """It stands there as it is; and were it markup, the page's policy would let nothing of it run or load."""
    browser.open(bad.address)
    browser.type("<img src=x onerror=document.title='lost'>")
    browser.until("document.querySelector('h2').textContent.endsWith(\"'lost'>\")")
    assert browser.value("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert HOSTILE.split(" \x1b")[0] in browser.value("document.querySelector('li p').textContent")
    assert browser.value("document.title") == "Search in x.npz"
    for markup in ("<img src=x onerror=document.title='lost'>", "<a href=javascript:document.title='lost' id=c>c</a>"):
        browser.value(f"document.body.insertAdjacentHTML('beforeend', {markup!r})")
    browser.value("document.getElementById('c').click()")
    browser.value("new Promise(done => setTimeout(done, 500))")
    assert browser.value("document.title") == "Search in x.npz"
    browser.until("[...document.querySelectorAll('li img')].every(one => one.complete)")
    shown = browser.value("[...document.querySelectorAll('li img')].filter(one => one.naturalWidth).length")
    assert shown == 3


@HAS_CHROMIUM
def test_a_page_of_pictures_holds_them_itself(bad: Served, browser: Browser, tmp_path: Path) -> None:
    """What --html writes, of the same hostile embeddings, opened as a file: its style and its three pictures."""
    words = [bad.log.parent / "x.npz", "<script>document.title='lost'</script>", "--html", tmp_path / "x.html"]
    forked.run(["-m", "train_clip.cli", "search", *map(str, words), "--device", "cpu"], check=True)
    browser.open((tmp_path / "x.html").as_uri())
    assert browser.value("document.title") == "Search in x.npz"
    assert browser.value("[...document.images].filter(one => one.naturalWidth == 40).length") == 3
    assert browser.value("getComputedStyle(document.querySelector('ol')).display") == "grid"
    assert browser.value("document.forms.length") == 0 and not browser.value("performance.getEntriesByType('resource')")


@HAS_CHROMIUM
def test_a_server_that_is_gone_is_told(tmp_path: Path, served: Served, browser: Browser) -> None:
    one = Served(tmp_path, served.log.parent / "x.npz")
    browser.open(one.address)
    one.process.terminate()
    one.process.wait(30)
    browser.type("hat")
    browser.until("document.querySelector('[role=status]').textContent.startsWith('No answer')")
