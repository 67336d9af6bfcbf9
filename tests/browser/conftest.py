"""JupyterLab on loopback in headless Chromium, with every request that leaves the machine refused and written down."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
)  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HARMLESS = ("ResizeObserver loop",)
WIDE, HIGH = 1280, 1000
INDICATOR = ".jp-Notebook-ExecutionIndicator"
ERRORS = """document.querySelectorAll('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')"""
PROMPTS = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]
    .filter(cell => cell.querySelector('.cm-content').textContent.trim())
    .map(cell => cell.querySelector('.jp-InputPrompt').textContent)"""
STARTED = f"() => ({PROMPTS})().some(text => /\\[[*0-9]/.test(text))"
DONE = f"() => ({PROMPTS})().every(text => /\\[\\d+\\]/.test(text)) || ({ERRORS}).length > 0"


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium; without one the test is skipped, or fails where CI is set."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = "no Chromium here; `apt-get install chromium` (or a Chrome on the PATH) runs the browser test"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A JupyterLab over copies of notebooks/ and figures/, with a home of its own: (address, token, folder)."""
    from memlens.book.lab import command

    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "figures"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen(
        command(port=port, browser=False, token=token), cwd=folder, env=_environment(folder), stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={token}", server, folder / "lab.log")
        yield address, token, folder
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def _environment(folder: Path) -> dict[str, str]:
    """No proxy leads out, figures go to the copy, and the user's own Jupyter settings stay out of it."""
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(folder / "lab" / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    tracker = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # every cell is in the page, also below the fold
    loopback = ",".join(LOOPBACK)
    return {
        **os.environ, **closed, **own, "no_proxy": loopback, "NO_PROXY": loopback, "HF_HUB_OFFLINE": "1",
        "MEMLENS_FIGURES": str(folder / "figures"), "JUPYTER_PLATFORM_DIRS": "0",
    }  # fmt: skip


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("JupyterLab did not start:\n" + log.read_text()[-3000:])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.went_wrong = report.failed or getattr(item, "went_wrong", False)
    return report


@pytest.fixture
def reader(chromium, lab, request):
    """A `Reader` at a page that may speak with loopback only; what it saw last is kept when the test fails."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=list(FLAGS))
        reader = Reader(browser.new_page(viewport={"width": WIDE, "height": HIGH}), *lab)
        yield reader
        reader.close()
        if request.node.went_wrong:
            reader.page.screenshot(path=SHOTS / f"failed-{re.sub('[^a-z0-9]+', '-', request.node.name)}.png")
        browser.close()


class Reader:
    """Someone who reads notebooks: opens one, runs it, moves a slider and looks. Keeps a list of what went wrong."""

    def __init__(self, page, address: str, token: str, folder: Path):
        self.page, self.address, self.token, self.folder = page, address, token, folder
        self.refused, self.failed, self.complaints = [], [], []
        page.route("**/*", self._guard)
        page.on("response", lambda answer: answer.status >= 400 and self.failed.append(f"{answer.status} {answer.url}"))
        page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _guard(self, route) -> None:
        if urlsplit(route.request.url).hostname in LOOPBACK:
            route.continue_()
        else:
            self.refused.append(route.request.url)
            route.abort()

    def ask(self, path: str, method: str = "GET"):
        """The server's own answer, as JSON."""
        request = urllib.request.Request(f"{self.address}/api/{path}?token={self.token}", method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or "null")

    def open(self, name: str) -> None:
        """Show a notebook in a workspace of its own and wait until its kernel has come to rest."""
        self.page.goto(f"{self.address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={self.token}")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        if self.page.locator(".jp-FileBrowser").is_visible():
            self.page.keyboard.press("Control+b")
        calm, end = 0, time.monotonic() + 90
        while calm < 6:
            self.page.wait_for_timeout(300)
            states = [session["kernel"]["execution_state"] for session in self.ask("sessions")]
            shown = self.page.locator(f"{INDICATOR}[data-status='idle']").count()
            calm = calm + 1 if states == ["idle"] and shown else 0
            assert time.monotonic() < end, f"no kernel for {name}: {states}"

    def close(self) -> None:
        """End every kernel, so that the next notebook has the machine to itself."""
        for session in self.ask("sessions"):
            self.ask(f"sessions/{session['id']}", "DELETE")

    def run_all(self, seconds: float = 420) -> None:
        """Run > Run All Cells; fails where a cell shows an error or writes to stderr."""
        self.page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        self.page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        self.page.wait_for_function(STARTED, timeout=30_000)
        self.page.wait_for_function(DONE, timeout=seconds * 1000)
        for kind in ("error", "stderr"):
            said = self.page.locator(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]')
            assert not said.count(), f"a cell shows this {kind}:\n{said.first.inner_text()[-2000:]}"

    def views(self) -> list:
        """The live views of the notebook: boxes of sliders with a picture, from the top."""
        boxes = self.page.locator(".memlens-view")
        return [boxes.nth(index) for index in range(boxes.count())]

    def settled(self, picture, seconds: float = 30) -> bytes:
        """The picture once two looks at it agree."""
        end, last = time.monotonic() + seconds, b""
        while time.monotonic() < end:
            last, before = picture.screenshot(), last
            if last == before:
                return last
            self.page.wait_for_timeout(300)
        pytest.fail("the picture never came to rest")

    def move(self, view, seconds: float = 30) -> float:
        """Move the first slider of a view by one step; the seconds until its picture changed."""
        handle = view.locator(".noUi-handle").first
        handle.scroll_into_view_if_needed()
        picture = view.locator(".memlens-screen")
        before = self.settled(picture)
        assert picture.locator("canvas, img").count(), "nothing is drawn beside the slider"
        for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):  # to the left where it stands at its end
            start = time.monotonic()
            handle.press(key)
            while time.monotonic() < start + seconds / 3:
                if picture.screenshot() != before:
                    return time.monotonic() - start
        pytest.fail("the slider moved and the picture did not")

    def whole(self, path: Path) -> None:
        """A screenshot of the whole notebook: the window grows to its length."""
        outer = "document.querySelector('.jp-WindowedPanel-outer')"
        tall = self.page.evaluate(
            f"Math.max(...[...{outer}.querySelectorAll('.jp-Cell')].map(c => c.offsetTop + c.offsetHeight))"
        )
        self.page.set_viewport_size({"width": WIDE, "height": min(int(tall) + 160, 16_000)})
        self.page.wait_for_timeout(1000)
        self.page.evaluate(f"{outer}.scrollTop = 0")
        self.page.wait_for_timeout(1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        self.page.set_viewport_size({"width": WIDE, "height": HIGH})

    def no_trouble(self) -> None:
        """Nothing was asked of the network, no request failed, the console has no error."""
        assert not self.refused, f"asked the network for {self.refused[:5]}"
        assert not self.failed, self.failed[:5]
        said = [line for line in self.complaints if not any(word in line for word in HARMLESS)]
        assert not said, said[:5]
