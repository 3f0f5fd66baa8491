"""Drives a headless Chromium over its debugging protocol; needs no driver program."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*"),
)
START_SECONDS = 60.0
WAIT_SECONDS = 60.0
KEYS = {
    "Tab": (9, None),
    "Enter": (13, "\r"),
    "Space": (32, " "),
    "ArrowLeft": (37, None),
    "ArrowUp": (38, None),
    "ArrowRight": (39, None),
    "ArrowDown": (40, None),
    "Home": (36, None),
    "End": (35, None),
}


def program() -> str | None:
    """Return the browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """One tab: asks, clicks and types, and notes what goes wrong in it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.problems: list[str] = []
        self._last_id = 0
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call the protocol; return the result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", "")
            self.problems.append(f"{details['text']} {thrown}")
        elif event["method"] == "Log.entryAdded":
            entry = params["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                self.problems.append(entry["text"])

    def ask(self, expression: str) -> Any:
        """Evaluate JavaScript; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Evaluate until it is true; return its value."""
        end = time.monotonic() + WAIT_SECONDS
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.text()}"
            time.sleep(0.05)
        return value

    def text(self, selector: str = "body") -> str:
        """Return the visible text of the first match."""
        return self.ask(f"document.querySelector({selector!r})?.innerText ?? ''")

    def is_shown(self, selector: str) -> bool:
        """Whether the first match is rendered."""
        found = f"document.querySelector({selector!r})"
        return self.ask(f"{found} !== null && {found}.getClientRects().length > 0")

    def open(self, url: str) -> None:
        """Load a page, from nothing."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState==='complete'")

    def media(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme='dark'."""
        named = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=named)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Set the window's size in CSS pixels; narrow ones are a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            code, text = KEYS[key]
            named = {"key": " " if key == "Space" else key, "code": key}
            named["windowsVirtualKeyCode"] = code
            down = {"text": text} if text else {}
            for kind, more in (("keyDown", down), ("keyUp", {})):
                self.call("Input.dispatchKeyEvent", type=kind, **named, **more)

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, selector: str) -> None:
        """Reach an element with the Tab key alone."""
        matches = f"document.activeElement?.matches({selector!r}) ?? false"
        for _ in range(60):
            if self.ask(matches):
                return
            self.press("Tab")
        raise AssertionError(f"Tab does not reach {selector}")

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        root = "document.documentElement"
        return self.ask(f"{root}.scrollWidth - {root}.clientWidth")

    def picture(self, *, whole: bool = False) -> bytes:
        """Return a PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def axe(self) -> list[str]:
        """Return what axe-core objects to, a line each."""
        source = resources.files("axe_playwright_python") / "axe.min.js"
        if self.ask("typeof axe === 'undefined'"):
            self.ask(source.read_text() + ";0")
        found = self.ask("axe.run().then((result) => result.violations)")
        return [
            f"{one['id']}: {one['help']}: {[n['html'][:120] for n in one['nodes'][:3]]}"
            for one in found
        ]


@contextmanager
def chromium(profile: Path) -> Iterator[Callable[[], Page]]:
    """Run a browser with an empty profile; yield what opens a tab."""
    path = program()
    assert path is not None
    arguments = [path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    tabs: list[Page] = []
    try:
        port = _port(profile / "DevToolsActivePort", process)

        def tab() -> Page:
            address = f"http://127.0.0.1:{port}/json/new?about:blank"
            made = httpx.put(address, timeout=30).raise_for_status().json()
            url = made["webSocketDebuggerUrl"]
            tabs.append(Page(connect(url, max_size=None, open_timeout=30)))
            return tabs[-1]

        yield tab
    finally:
        for one in tabs:
            one.socket.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + START_SECONDS
    while not file.exists() or not file.read_text().strip():
        assert process.poll() is None, "Chromium ended"
        assert time.monotonic() < end, "Chromium did not start"
        time.sleep(0.05)
    return int(file.read_text().split()[0])
