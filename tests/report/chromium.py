"""Chromium without a window, driven through its debugging pipe: what a page loads, complains of and lays out.

The pipe needs no port and no package: messages are JSON, each ended by a zero byte, on two descriptors of the browser.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE_SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser on the path, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Page:
    """A page that was loaded: what it asked the network for, what of that its policy held back, its complaints."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    held_back: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, by way of JSON."""
        answer = self.browser.call(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True},
            session=self.session,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window so wide, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.call("Emulation.setDeviceMetricsOverride", metrics, session=self.session)

    def prefer(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark`` pages."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.call("Emulation.setEmulatedMedia", {"features": features}, session=self.session)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page, also of what lies below the window's edge."""
        options = {"format": "png", "captureBeyondViewport": True}
        answer = self.browser.call("Page.captureScreenshot", options, session=self.session)
        path.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """A running browser, and the way to ask it something."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._asked = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """Ask, and return the answer; events that arrive before it are kept."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._asked:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])
            self._events.append(found)

    def open(self, url: str, width: int = 1280) -> Page:
        """Load a page and wait until all of it is there."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session=session)
        page = Page(self, session)
        page.resize(width)
        self._events.clear()
        self.call("Page.navigate", {"url": url}, session=session)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())
        # what a page says last arrives before the answer to what is asked after it
        page.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame)).then(() => 0)")
        _note(page, self._events)
        return page

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {PATIENCE_SECONDS:g} seconds"
            piece = os.read(self._reading, 1 << 16)
            assert piece, "the browser ended"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))


def _note(page: Page, events: list[dict[str, Any]]) -> None:
    asked: dict[str, str] = {}
    for event in events:
        method, params = event["method"], event.get("params", {})
        if method == "Network.requestWillBeSent":
            asked[params["requestId"]] = params["request"]["url"]
        elif method == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            page.held_back.append(asked.pop(params["requestId"]))
        elif method == "Runtime.exceptionThrown":
            page.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            page.complaints.append(f"{params['type']}: {[value.get('value') for value in params['args']]}")
        elif method == "Log.entryAdded":
            page.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")
    page.requests.extend(asked.values())


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own, and end it with all its processes."""
    their_reading, our_writing = os.pipe()
    our_reading, their_writing = os.pipe()
    # the shell moves the pipes to where the browser looks for them
    redirect = f'exec "$@" 3<&{their_reading} 4>&{their_writing}'
    process = subprocess.Popen(
        ["bash", "-c", redirect, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_reading, their_writing),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_reading)
    os.close(their_writing)
    try:
        yield Browser(our_reading, our_writing)
    finally:
        os.close(our_writing)
        os.close(our_reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
