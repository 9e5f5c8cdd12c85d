"""A headless Chromium for the tests, spoken to in its DevTools protocol through two pipes: nothing else is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60  # for an answer

KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
SHIFT = 8


class Browser:
    """One page of a Chromium with a profile of its own; a context manager, the browser ends with it."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 800):
        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",  # as root, in containers
            "--disable-dev-shm-usage",  # small there
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",  # commands on file descriptor 3, answers on 4
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", *command],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._session, self._read = 0, {}, b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.errors = []
        self("Runtime.enable")
        self("Page.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self._commands)  # Chromium ends when nobody can command it any more
        try:
            self._process.wait(timeout=SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._answers)

    def __call__(self, method: str, **parameters) -> dict:
        """Send one command of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + SECONDS
        while True:
            answer = self._next(give_up)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, give_up: float) -> dict:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0, give_up - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else b""
            assert part, f"no answer from {CHROMIUM} within {SECONDS} s, or it has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Show a local file; its scripts have run."""
        self("Page.navigate", url=path.absolute().as_uri())
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str):
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        give_up = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < give_up, f"{condition} did not come true within {SECONDS} s"
            time.sleep(0.02)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key, as a keyboard does."""
        code = KEY_CODES.get(key) or ord(key.upper())
        text = {"text": key} if len(key) == 1 else {}
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        self("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Another size of the window, and the light or dark colours that the reader's system asks for."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))
