"""Headless Chromium, spoken to by the DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
TIMEOUT = 60.0  # seconds


class Browser:
    """A browser with one page, which knows this machine alone.

    Args:
        folder: for its profile.
        more: further flags.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        (its, self._out), (self._in, its_out) = os.pipe(), os.pipe()
        words = [
            CHROMIUM,
            *FLAGS.split(),
            f"--user-data-dir={folder}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *more,
        ]
        # It reads from the descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{its} 4>&{its_out}', "-", *words, "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(its, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(its), os.close(its_out)
        self._left, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def close(self) -> None:
        """End it and its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in), os.close(self._out)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and wait for its result."""
        self._number += 1
        to = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters, **to}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._left:
            got = os.read(self._in, 1 << 16)
            assert got, "the browser has ended"
            self._left += got
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            with suppress(AssertionError):  # of a page that is only half there
                if self.value(script):
                    return
            time.sleep(0.05)
        raise AssertionError(f"never came true: {script}\n{self.value('document.body.innerText')}")

    def open(self, address: str) -> None:
        """Open a page, its pictures included."""
        assert "errorText" not in (got := self.call("Page.navigate", url=address)), got
        self.until("document.readyState == 'complete' && location.href != 'about:blank'")

    def type(self, text: str) -> None:
        """Press a key for each character."""
        for character in text:
            self.call("Input.dispatchKeyEvent", type="char", text=character)

    def press(self, key: str, code: int) -> None:
        """Press a key that is no character."""
        how = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **how, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)
