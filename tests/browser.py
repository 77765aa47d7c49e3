"""A headless Chromium, driven over its own protocol, and a JupyterLab for it: pages are opened, moved and looked at."""

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import websocket
from PIL import Image

from bonelib.scans.volumes import read_volume

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "scratch/browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,1000",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


class Page:
    """One page. `requests` are all addresses it asked for, `errors` what it said in its console as an error."""

    def __init__(self, address, downloads):
        self.socket, self.number = websocket.create_connection(address, timeout=180), itertools.count(1)
        self.requests, self.errors = [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if its window were in front
        leave = "addEventListener('beforeunload', e => e.stopImmediatePropagation(), true)"  # unasked, if unsaved
        self.call("Page.addScriptToEvaluateOnNewDocument", source=leave)
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def call(self, method, **params):
        number = next(self.number)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._noticed(message.get("method"), message.get("params"))

    def _noticed(self, event, what):
        if event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"][:200])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(what["exceptionDetails"].get("exception", what["exceptionDetails"]))[:300])
        elif event == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in what["args"])[:300])
        elif event == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}"[:300])

    def open(self, address):
        self.call("Page.navigate", url=str(address))

    def js(self, text):
        """The value of a script's expression."""
        done = self.call("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, text, seconds=60):
        """The value of an expression as soon as it is true."""
        end = time.time() + seconds
        while time.time() < end:
            if value := self.js(text):
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {text}; errors {self.errors}")

    def key(self, name, code=None, text=None):
        for kind in ("keyDown", "keyUp"):
            sent = {"type": kind, "key": name, "code": name, "windowsVirtualKeyCode": code or ord(name)}
            self.call("Input.dispatchKeyEvent", **sent, **({"text": text} if text and kind == "keyDown" else {}))

    def drag(self, of, across):
        """Move the middle of an element by `across` pixels to the right, with the left button held."""
        x, y = self.js(
            f"(() => {{ const b = document.querySelector({json.dumps(of)}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind, at, held in (("Pressed", 0, 1), *(("Moved", n / 10, 1) for n in range(1, 11)), ("Released", 1, 0)):
            where = dict(x=x + at * across, y=y, button="left", buttons=held, clickCount=1)
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **where)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def picture(self, path=None, of=None):
        """A PNG of the page, or of the first element that a selector finds; also written to `path`."""
        clip = {}
        if of:
            box = self.js(
                f"(() => {{ const b = document.querySelector({json.dumps(of)}).getBoundingClientRect();"
                " return {x: b.x, y: b.y, width: b.width, height: b.height, scale: 1}; })()"
            )
            clip = {"clip": box}
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        if path:
            path.write_bytes(data)
        return data

    def foreign(self):
        """Addresses it asked for that are not on this machine."""
        here = ("http://127.0.0.1", "ws://127.0.0.1", "file:", "data:", "blob:", "about:", "chrome")
        return [address for address in self.requests if not address.startswith(here)]


@contextlib.contextmanager
def browser(folder):
    """A `Page` of a new Chromium that keeps its profile and what it downloads in `folder`."""
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, end = folder / "profile/DevToolsActivePort", time.time() + 60
        while not (port.is_file() and port.read_text().strip()):
            assert process.poll() is None and time.time() < end, "Chromium did not start"
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json", timeout=60) as answer:
            target = next(t for t in json.load(answer) if t["type"] == "page")
        page = Page(target["webSocketDebuggerUrl"], downloads)
        page.process = process.pid
        yield page
        page.socket.close()
    finally:
        _end(process)


def _end(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def colours(png):
    """The colours of a PNG, of every seventh pixel."""
    return {tuple(c) for c in np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)[::7]}


def drawn(page, of, unlike=None, seconds=120):
    """A picture of an element as soon as it shows more than a few colours, and does not look like `unlike`."""
    end = time.time() + seconds
    while time.time() < end:
        picture = page.picture(of=of)
        if len(colours(picture)) > 50 and picture != unlike:
            return picture
        time.sleep(0.3)
    raise AssertionError(f"{of} did not change within {seconds} s")


@contextlib.contextmanager
def lab(folder, token, home=None):
    """JupyterLab of a folder on a free port of this machine, with a token as `make lab` has; its address."""
    home = home or folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    command += ["--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    place = {"HOME": str(home), "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(home / "config")}
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **place}, stdout=log, stderr=log)
        try:
            end = time.time() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=30).close()
                    break
                except OSError:
                    assert server.poll() is None and time.time() < end, (home / "lab.log").read_text()[-2000:]
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(server)


# The notebook has a kernel, and is the one that commands mean
_READY = """(() => {
    const app = window.jupyterapp, notebook = [...app.shell.widgets("main")].find(w => w.sessionContext);
    if (!notebook?.sessionContext.session?.kernel) return false;
    app.shell.activateById(notebook.id);
    return app.shell.currentWidget === notebook;
})()"""


def click(page, text):
    """Click the first button or link with this text."""
    found = "[...document.querySelectorAll('.jp-OutputArea button, .jp-OutputArea a')]"
    page.js(f"{found}.find(b => b.textContent.trim().startsWith({text!r})).click()")


def write_notebook(path, *cells):
    """A notebook of these code cells that names its kernel; without one, Lab would ask."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)


def run_all(page, lab, token, path):
    """Open a notebook of the folder that the address `lab` serves, and begin to run all its cells."""
    page.open(f"{lab}/lab/tree/{path}?reset&token={token}")
    page.wait("!!document.querySelector('.jp-Notebook .jp-CodeCell') && !!window.jupyterapp", 120)
    page.wait(_READY, 120)
    page.js("void window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true; })")


def outputs(page):
    """What the cells of the open notebook have said so far, as nbformat has it, also where none of it is in sight."""
    content = "window.jupyterapp.shell.currentWidget.content.widgets"
    return page.js(f"{content}.flatMap(c => c.model.type === 'code' ? c.model.outputs.toJSON() : [])")


def fetched(file, seconds=30):
    """A file that the browser is about to save, as soon as it is there."""
    end = time.time() + seconds
    while not file.is_file():
        assert time.time() < end, f"no {file.name} within {seconds} s"
        time.sleep(0.1)
    return file


NUMBERS = "[...document.querySelectorAll('.jp-OutputArea .widget-html-content td')].map(c => c.textContent).join()"
RECIPE = "document.querySelector('.jp-OutputArea textarea').value"
CANVAS = ".jp-OutputArea canvas"


def used(page, folder, picture, key=("ArrowRight", 39)):
    """Move the first slider of a view, see numbers, recipe and volume follow, and take the bone along: a `Volume`."""
    page.wait(f"!!document.querySelector('{CANVAS}')", 180)  # a kernel imports torch, beside other tests
    page.js(f"document.querySelector('{CANVAS}').scrollIntoView({{block: 'center'}})")
    first, numbers, recipe = drawn(page, CANVAS), page.wait(NUMBERS), page.js(RECIPE)
    page.js("document.querySelector('.jp-OutputArea .noUi-handle').focus({preventScroll: true})")
    page.key(*key)
    page.wait(f"{RECIPE} != {recipe!r} && {NUMBERS} != {numbers!r}", 120)
    page.js(f"document.querySelector('{CANVAS}').scrollIntoView({{block: 'center'}})")
    drawn(page, CANVAS, unlike=first)
    page.picture(PICTURES / f"{picture}.png")
    click(page, "NIfTI")
    page.wait("!!document.querySelector('.jp-OutputArea a[download]')", 60)
    click(page, "download")
    file, kept = fetched(folder / "downloads/bone.nii.gz"), read_volume(folder / "downloads/bone.nii.gz", unit="mgHA")
    file.unlink()
    return kept
