"""Headless Chromium, driven over WebDriver: plain HTTP to Debian's chromedriver."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import HOST, free_port

WAIT_SECONDS = 90.0
# What WebDriver calls a reference to an element.
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, driver: str, session: str, version: str) -> None:
        self._base = f"{driver}/session/{session}"
        self.version = version

    def open(self, url: str) -> None:
        _call(f"{self._base}/url", {"url": url})

    def size(self, width: int, height: int) -> None:
        """Make the page that wide and high, in pixels."""
        _call(f"{self._base}/window/rect", {"width": width, "height": height})

    def run(self, script: str, *arguments: object) -> Any:
        """What a JavaScript function body returns in the page."""
        body = {"script": script, "args": list(arguments)}
        return _call(f"{self._base}/execute/sync", body)

    def text(self) -> str:
        """All that can be read on the page."""
        return str(self.run("return document.body.innerText"))

    def wait_for(self, script: str, *arguments: object, what: str = "") -> Any:
        """The first value of a function body that is neither empty nor null nor false."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < deadline, f"{what or script} never came:\n{self.text()}"
            time.sleep(0.3)
        return value

    def wait_for_text(self, *texts: str) -> str:
        """The page's text once it holds all of `texts`."""
        for text in texts:
            self.wait_for("return document.body.innerText.includes(arguments[0])", text, what=text)
        return self.text()

    def click(self, script: str, *arguments: object) -> None:
        """Click as a mouse does on the element that a function body finds, once it is there."""
        element = self.wait_for(script, *arguments)[_ELEMENT]
        _call(f"{self._base}/element/{element}/click", {})

    def picture(self, file: Path) -> None:
        """Save what the window shows as a PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(_call(f"{self._base}/screenshot")))


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A headless Chromium with a profile of its own."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise FileNotFoundError("apt-get install chromium chromium-driver")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="runner-chromium-") as profile:
        process = subprocess.Popen(
            [driver, f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        url = f"http://{HOST}:{port}"
        try:
            _ready(url, process)
            arguments = ["--headless=new", f"--user-data-dir={profile}/data", "--no-first-run"]
            arguments += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"]
            arguments += [f"--window-size={width},{height}", "--disable-background-networking"]
            if os.geteuid() == 0:
                arguments.append("--no-sandbox")  # Chromium's sandbox refuses root
            options = {"args": arguments, "binary": program}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options}
            made = _call(f"{url}/session", {"capabilities": {"alwaysMatch": wanted}})
            version = made["capabilities"]["browserVersion"]
            browser = Browser(url, made["sessionId"], version)
            try:
                yield browser
            finally:
                _call(f"{url}/session/{made['sessionId']}", method="DELETE")
        finally:
            process.terminate()
            process.wait(20)


def _ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if _call(f"{url}/status")["ready"]:
                return
        assert process.poll() is None and time.monotonic() < deadline, "chromedriver did not start"
        time.sleep(0.2)


def _call(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=180) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        answer = json.load(error)["value"]
        raise AssertionError(f"{answer['error']}: {answer['message'].splitlines()[0]}") from error
