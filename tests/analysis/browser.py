"""A headless Chromium over the DevTools protocol."""

import base64
import json
import subprocess
import tempfile
import time
import urllib.request

import websocket

KEYS = {"Enter": {"windowsVirtualKeyCode": 13, "text": "\r"}, "Escape": {"windowsVirtualKeyCode": 27}, "Tab": {"windowsVirtualKeyCode": 9}}


class Reloaded(Exception):
    """The page was loaded anew before it could answer."""


class Browser:
    """One page. `js` evaluates, `events` are what the browser reported since `open`."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0",
             "--remote-allow-origins=*", f"--user-data-dir={self.profile.name}", "about:blank"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        address = next(line.split()[-1] for line in self.process.stderr if "DevTools listening on" in line)
        port = address.split("/")[2].rpartition(":")[2]
        pages = until(lambda: [t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10)) if t["type"] == "page"])
        self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=30)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)
        self("Browser.grantPermissions", permissions=["clipboardReadWrite"])

    def __call__(self, method, **parameters):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Reloaded
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, file, width=1280, height=900, scheme="light"):
        """Load `file` and wait until its script has run."""
        self("Page.navigate", url="about:blank")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=file.as_uri())
        until(lambda: self.js("document.readyState === 'complete' && location.protocol === 'file:'"))
        return self

    def js(self, expression):
        """The value of `expression`, a promise's when it is kept. What a reload cuts off is evaluated on the new page."""
        try:
            found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        except Reloaded:
            time.sleep(0.1)
            return self.js(expression)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def texts(self, selector):
        """The texts of the visible elements that fit `selector`."""
        return self.js(f"[...document.querySelectorAll({selector!r})].filter((e) => e.checkVisibility()).map((e) => e.textContent)")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, **KEYS[key])

    def point(self, x, y):
        """Move the mouse to (x, y) of the window."""
        for dx in (3, 0):
            self("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx, y=y)

    def complaints(self):
        """Exceptions, messages of the console and dialogs since `open`."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [e for e in self.events if e["method"] in kinds]

    def requests(self):
        """Addresses that were asked for since `open`."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)
        self.profile.cleanup()


def until(condition, seconds=15):
    """What `condition()` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found
