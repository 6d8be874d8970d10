"""A page in headless Chromium, driven over its debugging pipe: no driver, no port and no package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FLAGS = (
    "--headless",
    "--no-sandbox",  # the pages are our own, and root has no other way
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE_S = 60.0


class Page:
    """One tab. `problems` are errors and warnings of its console, exceptions among them."""

    def __init__(self, process: subprocess.Popen, read: int, write: int):
        self._process = process
        self._read = read
        self._write = write
        self._rest = b""
        self._count = 0
        self.problems: list[str] = []

        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            assert more, f"Chromium ended with status {self._process.poll()}"
            self._rest += more
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))

    def open(self, address: str, *, width: int = 1280, height: int = 900) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        # Another address first: a change behind # alone loads nothing.
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def ask(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            if found := self.ask(script):
                return found
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}; {self.problems}")

    def press(self, key: str) -> None:
        """Strikes a key, named as JavaScript names it."""
        text = key if len(key) == 1 else {"Enter": "\r"}.get(key, "")
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        known = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self._call("Input.dispatchKeyEvent", type="keyUp", **known)

    def point(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def names(self) -> list[tuple[str, str]]:
        """(role, name) of what a screen reader is told of."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and "role" in node
        ]

    def picture(self, file: Path) -> None:
        data = self._call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A page of a browser that keeps its files in the folder `profile`."""
    assert BINARY is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()

    def at_three_and_four() -> None:
        # By way of numbers that are free for certain: one of the pipes may lie at 3 or 4 itself.
        given = os.dup2(command_read, 100)
        taken = os.dup2(answer_write, 101)
        os.dup2(given, 3)
        os.dup2(taken, 4)

    process = subprocess.Popen(
        [BINARY, *_FLAGS, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=at_three_and_four,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Page(process, answer_read, command_write)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(command_write)
        os.close(answer_read)
