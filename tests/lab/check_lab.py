"""JupyterLab itself, driven in a headless Chromium: the notebooks open without complaint, and the explorer answers.

Opt-in, by `make test-lab`. The DevTools protocol is spoken over websocket-client, which Jupyter Server brings along.
"""

import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import websocket

from atp_utils import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt install chromium, for example")
BOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
PATIENCE = 600  # seconds until something has surely gone wrong


class Page:
    """A page of the browser at the DevTools address ``url``."""

    def __init__(self, url: str):
        self.socket, self.sent = websocket.create_connection(url, timeout=PATIENCE, suppress_origin=True), 0

    def call(self, method: str, **params) -> dict:
        """The result of a method of the protocol; events that arrive before it are dropped."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, code: str):
        """What JavaScript ``code`` comes to; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, code: str):
        """The first value of ``code`` that is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.value(code)):
            assert time.monotonic() < end, code
            time.sleep(0.2)
        return value


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with settings of its own, on a copy of the notebooks."""
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(16)
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, values in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
           "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {name: str(home / folder) for name, folder in own.items()} | {"PYTHONPATH": paths}
    given = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'notebooks'}",
             "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with (home / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *given], env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/lab?token={token}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    """The page of a Chromium in which JupyterLab has started."""
    home = tmp_path_factory.mktemp("chromium")
    given = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars",
             "--no-proxy-server", f"--user-data-dir={home}", "--window-size=1320,1000", "about:blank"]  # fmt: skip
    browser = subprocess.Popen([CHROMIUM, *given], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        try:
            yield _started(lab, home / "DevToolsActivePort")
        finally:
            browser.terminate()
            browser.wait(60)


def _started(lab: str, ready: Path) -> Page:
    end = time.monotonic() + PATIENCE
    while not (ready.is_file() and ready.read_text().count("\n")):
        assert time.monotonic() < end, "Chromium didn't start"
        time.sleep(0.2)
    with urllib.request.urlopen(f"http://127.0.0.1:{ready.read_text().split()[0]}/json") as listing:
        [url] = [tab["webSocketDebuggerUrl"] for tab in json.load(listing) if tab["type"] == "page"]
    page = Page(url)
    while True:
        try:
            page.call("Page.navigate", url=lab)
            page.until("Boolean(window.jupyterapp)")
            page.value("jupyterapp.restored.then(() => true)")
            return page
        except AssertionError:
            assert time.monotonic() < end
            time.sleep(1)


def opened(page: Page, book: str) -> None:
    """Open a notebook, with its kernel, as ``window.panel``."""
    page.value(f"""(async () => {{
        window.panel = await jupyterapp.commands.execute("docmanager:open", {{path: "{book}.ipynb"}});
        await panel.context.ready; await panel.sessionContext.ready; await panel.revealed; return true;
    }})()""")


def complaints(page: Page) -> list[str]:
    """Dialogs and pop-ups that are open, and errors that cells show."""
    shown = ".jp-Dialog, .Toastify__toast, .jupyter-widgets-error-widget, [data-mime-type$='.stderr']"
    return page.value(f"""[...document.querySelectorAll("{shown}")].map(found => found.innerText)""")


@pytest.mark.parametrize("book", BOOKS)
def test_a_notebook_opens_without_complaint(page, book):
    opened(page, book)
    time.sleep(2)  # until what might complain has
    assert complaints(page) == []
    assert page.value("panel.sessionContext.kernelDisplayName") == "Python 3 (ipykernel)"
    links = r"""[...panel.node.querySelectorAll(".jp-MarkdownCell li a")].map(link => link.getAttribute("href"))
        .filter(to => to.startsWith("#")).map(to => decodeURIComponent(to.slice(1)))"""
    assert page.until(f"{links}.length") > 3
    # Cells further down are rendered when there is time.
    page.until(f"""{links}.every(to => panel.node.querySelector(`[id="${{to}}"], [data-jupyter-id="${{to}}"]`))""")
    page.value("panel.sessionContext.shutdown().then(() => panel.dispose()).then(() => true)")


def test_the_explorer_answers_to_its_widgets(page):
    opened(page, "11_explore")
    page.value("void jupyterapp.commands.execute('notebook:run-all-cells')")
    count = page.until("""panel.content.widgets.filter(cell => cell.model.type === "code")
        .every(cell => cell.model.executionState === "idle" && cell.model.executionCount > 0)
        && [...panel.node.querySelectorAll(".widget-html b, .jupyter-widgets b")].length""")
    assert count and complaints(page) == []
    probability = r"""[...panel.node.querySelectorAll(".widget-html-content")]
        .map(found => found.innerText.match(/^P\(deviate\) ([0-9.]+)/)).find(Boolean)[1]"""
    before = page.until(probability)
    took = page.value(f"""(async () => {{
        const round = [...panel.node.querySelectorAll(".widget-dropdown")]
            .find(found => found.querySelector("label").innerText === "round 1").querySelector("select");
        round.closest(".jp-Cell").scrollIntoView();
        const began = performance.now();
        round.value = "deviated";
        round.dispatchEvent(new Event("change", {{bubbles: true}}));
        while ({probability} === "{before}" && performance.now() - began < {1000 * PATIENCE})
            await new Promise(again => setTimeout(again, 20));
        return (performance.now() - began) / 1000;
    }})()""")
    after = page.value(probability)
    print(f"P(deviate) {before} -> {after}, {took:.2f} s after the edit")
    assert float(after) != float(before)
    if name := os.environ.get("SCREENSHOT"):
        time.sleep(2)
        Path(name).write_bytes(base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"]))
