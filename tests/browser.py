"""A headless Chromium, driven over its own protocol: pages are opened, moved, read and photographed."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import websocket

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
        yield page
        page.socket.close()
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
