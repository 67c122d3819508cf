"""Opens the page of a report in headless Chromium and looks at it: python docs/measure/report_page.py PAGE --pictures FOLDER

It prints what the page says at several settings of its sliders beside what remoe_cli/report/what_if.py computes, and takes pictures at 400
and 1400 pixels, light, dark and as printed. It exits with 1 where figures differ by more than rounding, where the console shows a message,
where the page asks for anything but itself, or where it is wider than the window. Chromium has to be installed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from remoe_cli.report.what_if import Setting, Table, evaluate

WIDTHS = (400, 1400)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
OPTIONS += ("--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--hide-scrollbars")
SETTINGS = [
    Setting(price=p, overhead=o, per_hour=h) for p, o, h in itertools.product((0.25, 1.0, 3.0), (0.1, 1.0, 8.0), (0.5, 20.0, 5000.0))
]


class Browser:
    """A tab of Chromium, over its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.last, self.events = socket, 0, list[dict[str, Any]]()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result; what happens meanwhile goes to `events`."""
        self.last += 1
        await self.socket.send_json({"id": self.last, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == self.last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            self.events.append(message)

    async def value(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    given = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("Chromium is not installed.")
    given.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(program, *OPTIONS, f"--user-data-dir={folder}", stderr=asyncio.subprocess.PIPE)
        try:
            faults = await look(process, given.page.resolve(), given.pictures)
        finally:
            process.terminate()
            await process.wait()
    for fault in faults:
        print("FAULT", fault)
    sys.exit(bool(faults))


async def look(process: asyncio.subprocess.Process, page: Path, pictures: Path) -> list[str]:
    """Look at the page, and list what is wrong with it."""
    assert process.stderr is not None
    address = ""
    while not address:
        found = re.search(rb"ws://([\d.]+:\d+)/", await process.stderr.readline())
        address = found[1].decode() if found else ""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://{address}/json/new?about:blank") as answer:
            socket = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(socket, max_msg_size=2**28) as connected:
            tab = Browser(connected)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            faults = []
            for width, scheme in itertools.product(WIDTHS, ("light", "dark")):
                await show(tab, page, width, scheme)
                faults += await fits(tab, f"{width} pixels, {scheme}")
                await picture(tab, pictures / f"{page.stem}-{width}-{scheme}.png", width)
            faults += await figures(tab)
            faults += await keyboard(tab)
            await show(tab, page, 1000, "dark", "print")
            await tab.value("dispatchEvent(new Event('beforeprint'))")
            await picture(tab, pictures / f"{page.stem}-printed.png", 1000)
            return faults + heard(tab, page)


async def show(tab: Browser, page: Path, width: int, scheme: str, media: str = "") -> None:
    await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    await tab.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.call("Page.navigate", url=page.as_uri())
    await tab.value(
        "new Promise((done) => document.readyState === 'complete' ? setTimeout(done, 300) : onload = () => setTimeout(done, 300))"
    )


async def fits(tab: Browser, what: str) -> list[str]:
    wide = await tab.value("document.documentElement.scrollWidth - innerWidth")
    return [f"{what}: {wide} pixels too wide"] if wide > 0 else []


async def picture(tab: Browser, path: Path, width: int) -> None:
    height = await tab.value("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = await tab.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(taken["data"]))
    print(path, f"{width} x {height}")


async def figures(tab: Browser) -> list[str]:
    """Hold the page's own sums against those of the package."""
    stored = await tab.value("JSON.stringify(data.table ?? null)")
    if stored == "null":
        return []
    table, worst, faults = Table.model_validate_json(stored), 0.0, []
    settings = [one.model_copy(update={"concurrency": number}) for one in SETTINGS for number in table.numbers]
    for setting in settings:
        asked = json.dumps(
            {
                "price": setting.price,
                "overhead": setting.overhead,
                "perHour": setting.per_hour,
                "concurrency": setting.concurrency,
            }
        )
        page = await tab.value(f"evaluate(data.table, {asked})")
        for each, (title, ours) in zip(page, evaluate(table, setting).items(), strict=True):
            for name, value in (("usd", ours.usd), ("ttftS", ours.ttft_s), ("tpotS", ours.tpot_s), ("instances", ours.instances)):
                off = abs((each[name] or 0) - (value or 0)) / max(abs(value or 0), 1e-300)
                worst = max(worst, off)
                if not math.isclose(each[name] or 0, value or 0, rel_tol=1e-9):
                    faults.append(f"{title}, {name} at {setting}: the page says {each[name]}, the package {value}")
    print(f"{len(settings)} settings of the sliders: the page differs by at most {worst:.1e} of a figure")
    return faults


async def keyboard(tab: Browser) -> list[str]:
    """Move through each map, and move each slider to its ends, with keys alone."""
    faults = []
    for index in range(await tab.value("document.querySelectorAll('canvas').length")):
        await tab.value(f"document.querySelectorAll('canvas')[{index}].focus()")
        for key in ("ArrowRight", "ArrowDown", "End"):
            await tab.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
            await tab.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)
        said = await tab.value(f"document.querySelectorAll('.reading')[{index}].textContent")
        print("by keyboard:", said)
        faults += [] if said.startswith("Layer ") else [f"map {index} says nothing to the keyboard"]
    if await tab.value("!!document.querySelector('.sliders input')"):
        for slider in await tab.value("[...document.querySelectorAll('.sliders input')].map((each) => each.id)"):
            before = await tab.value(f"document.getElementById('{slider}').focus(), document.querySelector('table.costs').innerText")
            for key, code in (("End", 35), ("Home", 36)):
                await tab.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code)
                after = await tab.value("document.querySelector('table.costs').innerText")
                print(slider, key, await tab.value("document.getElementById('now').textContent"))
                faults += [f"{slider} does nothing at its {key}"] if key == "End" and before == after else []
            await tab.value("document.getElementById('reset').click()")
    return faults


def heard(tab: Browser, page: Path) -> list[str]:
    """List messages of the console, and requests for anything but the page."""
    faults = []
    for event in tab.events:
        if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            faults.append(f"console: {json.dumps(event['params'])[:400]}")
        if event.get("method") == "Network.requestWillBeSent" and event["params"]["request"]["url"] != page.as_uri():
            faults.append(f"network: {event['params']['request']['url'][:200]}")
    return faults


if __name__ == "__main__":
    asyncio.run(main())
