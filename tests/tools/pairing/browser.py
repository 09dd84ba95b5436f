"""A headless Chromium that tests drive through its debugging pipe, without further packages."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_diffusion_sdpo.tools.pairing.server import PickServer
from trl_diffusion_sdpo.tools.pairing.session import PickSession

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a headless Chromium. Use it in a `with` block."""

    def __init__(self, profile: Path, width: int = 1440, height: int = 900, *, phone: bool = False) -> None:
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" {options} about:blank 3<&{theirs_in} 4>&{theirs_out}', CHROMIUM],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._write, self._read = os.fdopen(write, "wb", buffering=0), os.fdopen(read, "rb")
        self._number, self._session, self._buffer = 0, None, b""
        self.messages: list[dict[str, Any]] = []  # events, such as errors of scripts
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        if phone:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)
            self.call("Emulation.setEmulatedMedia", features=[{"name": "hover", "value": "none"}])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._write.close()
        self._read.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._read.fileno(), 1 << 20)
                assert part, "The browser has ended."
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.messages.append(answer)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        box = self.run(
            f"(b => ({{x: b.left + b.width / 2, y: b.top + b.height / 2}}))"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def errors(self) -> list[str]:
        """Return errors of scripts and refused loads."""
        self.run("1")
        return [
            json.dumps(one["params"])
            for one in self.messages
            if one.get("method") == "Runtime.exceptionThrown"
            or (one.get("method") == "Log.entryAdded" and one["params"]["entry"]["level"] == "error")
        ]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def served(folder: Path, browser: Browser, *, thumbs: bool = False) -> Iterator[PickSession]:
    """Serve the pick page of a folder, and open it in the browser."""
    session = PickSession(folder, thumbs=thumbs)
    with PickServer(session, port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            browser.open(server.address)
            browser.wait("typeof state === 'object' && state && !busy")
            yield session
        finally:
            server.shutdown()
    session.close()
