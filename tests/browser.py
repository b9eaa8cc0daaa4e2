"""A headless Chromium, spoken to over its pipe (the DevTools protocol), of which the standard library is enough."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium on this machine (Debian's package: chromium)"


class Browser:
    """One page of one Chromium; `events` are those of the page, in their order."""

    def __init__(self, profile: Path):
        # The browser reads commands from 3 and writes to 4; ours are moved away from those numbers.
        theirs_in, ours_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        flags = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        flags += ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
        flags += ["--disable-dev-shm-usage", "--disable-extensions", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, PROGRAM, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.to, self.by = ours_out, ours_in
        self.number, self.session, self.held = 0, None, b""
        self.events: list[dict[str, Any]] = []
        [target] = [one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result."""
        self.number += 1
        said = {"id": self.number, "method": method, "params": parameters}
        os.write(self.to, json.dumps(said | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, path: Path, *, width: int, scheme: str, height: int = 900) -> None:
        """Shows a file in a window of some width, light or dark; what went before is forgotten."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._next())

    def seen(self, method: str) -> list[dict[str, Any]]:
        """The events of a name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """What a piece of JavaScript is, in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, path: Path, height: int | None = None, scale: float = 1) -> None:
        """Writes the page, or the top of it, as an image of the kind that the name has."""
        width, whole = self.value("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": scale}
        kind = path.suffix[1:]
        quality = {} if kind == "png" else {"quality": 80}
        shot = self.ask("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True, **quality)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Ends it."""
        self.ask("Browser.close") if self.process.poll() is None else None
        self.process.wait(10)
        os.close(self.to)
        os.close(self.by)

    def _next(self, seconds: float = 30) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.by], [], [], max(0, until - time.monotonic()))
            part = os.read(self.by, 1 << 20) if ready else b""
            assert part, f"Chromium said nothing more (status {self.process.poll()})"
            self.held += part
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)
