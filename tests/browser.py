"""Chromium without a window, driven through its debugging protocol: what a page shows, asks for and complains about."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

COMMAND = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 90.0  # seconds until a page shows what is looked for


class Page:
    """One page. Its console's errors and its requests are kept as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_str(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads((await self.socket.receive(timeout=PATIENCE)).data)
            if message.get("id") == self.number:
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        said, about = message.get("method"), message.get("params", {})
        if said == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif said == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(about["exceptionDetails"])[:500])
        elif said == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.errors.append(json.dumps(about["args"])[:500])
        elif said == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])

    async def go(self, address: str) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.ask("Page.navigate", url=address)

    async def evaluate(self, script: str) -> Any:
        return (await self.ask("Runtime.evaluate", expression=script, awaitPromise=True))["result"].get("value")

    async def shows(self, *words: str) -> str:
        """The page's text, as soon as all of these are in it."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        text = ""
        while not all(word in text for word in words):
            missing = [word for word in words if word not in text]
            assert asyncio.get_running_loop().time() < deadline, f"{missing} not shown, but: {text[:3000]}"
            await asyncio.sleep(0.2)
            text = await self.evaluate("document.body ? document.body.innerText : ''") or ""
        return text

    async def picture(self, path: Path, whole: bool = False) -> None:
        taken = await self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))


def browse(visit: Callable[[Page], Any], folder: Path, width: int = 1400, height: int = 1000) -> Any:
    """Opens a browser with a profile in `folder` and runs the coroutine function `visit` on a page of it."""
    assert COMMAND, "Chromium is needed: install the Debian package chromium"
    arguments = [
        *(COMMAND, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--remote-debugging-port=0", "--remote-allow-origins=*", f"--window-size={width},{height}"),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"),
        "about:blank",
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        port = next(line.split(":")[-1].split("/")[0] for line in process.stderr if "DevTools listening" in line)
        return asyncio.run(_visit(int(port), visit))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


async def _visit(port: int, visit: Callable[[Page], Any]) -> Any:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            [target] = [each for each in await answer.json() if each["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            return await visit(Page(socket))
