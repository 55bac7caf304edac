"""A headless Chromium that opens a file and tells what a person would see, over its DevTools protocol."""

import asyncio
import base64
import io
import os
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

PATH = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
FLAGS += " --disable-background-networking --disable-component-update --remote-debugging-port=0"

# Labels of charts that lie on each other or stick out of their chart, of what is open.
MEETING = """[...document.querySelectorAll('.chart')].flatMap(chart => {
  const texts = [...chart.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  const all = chart.getBoundingClientRect();
  const meet = ([, a], [, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  return texts.flatMap((a, i) => texts.slice(i + 1).filter(b => meet(a, b)).map(b => a[0] + ' on ' + b[0]))
    .concat(texts.filter(([, r]) => r.left < all.left - 1 || r.right > all.right + 1).map(([t]) => t + ' sticks out'));
})"""


class Page:
    """An open page. errors: what its console complained of. requests: every address that it asked for."""

    def __init__(self, socket):
        self._socket, self._last = socket, 0
        self.errors, self.requests, self._loaded = [], [], False

    async def ask(self, method, **params):
        """The answer to a command; events on the way are kept."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while True:
            told = await self._socket.receive_json(timeout=30)
            if told.get("id") == self._last:
                assert "error" not in told, told
                return told["result"]
            self._heard(told)

    def _heard(self, event):
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        if kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        self._loaded |= kind == "Page.loadEventFired"

    async def open(self, file, width=1280, height=900, dark=False, scripts=True):
        """Load a file in a window of this size; a narrow one is a phone."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.ask(f"{domain}.enable")
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                       mobile=width < 500)  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.ask("Emulation.setEmulatedMedia", features=scheme)
        await self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        await self.ask("Page.navigate", url=Path(file).absolute().as_uri())
        while not self._loaded:
            self._heard(await self._socket.receive_json(timeout=30))

    async def run(self, expression):
        """What a JavaScript expression comes to."""
        told = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def height(self):
        """Of all of the page, in CSS pixels."""
        return (await self.ask("Page.getLayoutMetrics"))["cssContentSize"]["height"]

    async def screenshot(self):
        """The window as a PNG's bytes."""
        return base64.b64decode((await self.ask("Page.captureScreenshot"))["data"])


@asynccontextmanager
async def page(folder):
    """A page of a browser of its own, which ends with it."""
    profile = Path(folder) / "profile"
    command = [PATH, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    own = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"HOME": str(folder)}}
    process = subprocess.Popen(command, **own)
    try:
        port = await _port(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                [target] = [t for t in await answer.json() if t["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        process.terminate()  # its own process; its children end with it
        process.wait(10)


async def _port(file):
    for _ in range(200):
        if file.is_file() and file.read_text().strip():
            return int(file.read_text().split()[0])
        await asyncio.sleep(0.05)
    raise TimeoutError(f"{PATH} opened no port")


def colours(png):
    """How many different colours a PNG has, and its size."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    return len(set(image.resize((200, 200)).getdata())), image.size
