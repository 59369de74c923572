"""A headless Chromium, driven by chromedriver over its own protocol, which is JSON over HTTP."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@contextlib.contextmanager
def browser(width=1200, height=900, *, dark=False):
    """A window of some size, with what a page is told of the user's wish for dark."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        window = _Window(f"http://127.0.0.1:{port}")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        window.devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield window
        window.close()
    finally:
        driver.terminate()
        driver.wait(20)


class _Window:
    def __init__(self, address):
        self._address, limit = address, time.monotonic() + 30
        options = {"args": list(_ARGUMENTS)}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        wanted["capabilities"]["alwaysMatch"]["goog:loggingPrefs"] = {"browser": "ALL"}
        while True:
            try:
                found = self._post("/session", wanted)
                break
            except urllib.error.URLError:  # chromedriver is starting
                if time.monotonic() > limit:
                    raise
                time.sleep(0.1)
        self._session = f"/session/{found['sessionId']}"

    def open(self, path):
        self._post(f"{self._session}/url", {"url": path.as_uri()})

    def run(self, script):
        """What a script returns."""
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def click(self, selector, place=0):
        """A user's click in the middle of an element, which must be there and be seen."""
        found = self._post(f"{self._session}/elements", {"using": "css selector", "value": selector})
        (element,) = found[place].values()
        self._post(f"{self._session}/element/{element}/click", {})

    def devtools(self, command, parameters):
        return self._post(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def errors(self):
        """What the console of the page has, warnings too."""
        return self._post(f"{self._session}/se/log", {"type": "browser"})

    def screenshot(self, path):
        found = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self):
        request = urllib.request.Request(self._address + self._session, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def _post(self, path, content):
        data = json.dumps(content).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
