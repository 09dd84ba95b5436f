"""An evening acted out in a browser: keys, clicks, a restart, a prompt with HTML, and the phone's layout."""

import json
import threading

import pytest
from pairing.browser import CHROMIUM, Browser

from trl_diffusion_sdpo.pairing.server import PickServer
from trl_diffusion_sdpo.pairing.session import PickSession

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")


class Page:
    """A pick page in a browser."""

    def __init__(self, folder, browser):
        self.browser, self.session = browser, PickSession(folder)
        self.server = PickServer(self.session, port=0)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        browser.open(self.server.address)
        self.wait()

    def wait(self, judged=None):
        reached = "" if judged is None else f" && state.judged === {judged}"
        self.browser.wait(f"typeof state === 'object' && state && !busy{reached}")

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.session.close()


def test_an_evening(folder, tmp_path):
    manifest = (folder / "manifest.jsonl").read_text()
    html = "<img src=x onerror=alert(1)>"
    (folder / "manifest.jsonl").write_text(manifest.replace('"prompt": "a"', f'"prompt": "{html}"'))
    with Browser(tmp_path / "profile") as browser:
        page = Page(folder, browser)
        assert browser.run("document.querySelector('#prompt span').textContent") == html
        assert browser.run("document.querySelectorAll('#prompt img').length") == 0
        for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowUp")):
            browser.press(key)
            page.wait(number + 1)
        browser.click("#first img")
        page.wait(4)
        browser.press("u")
        page.wait(3)
        page.close()
        browser.press("ArrowLeft")
        browser.wait("!document.querySelector('#told').hidden")  # no answer, and no pick
        page = Page(folder, browser)
        assert browser.run("state.judged") == 3
        while browser.run("state.pair !== null"):
            judged = browser.run("state.judged")
            browser.press("ArrowLeft")
            page.wait(judged + 1)
        assert not browser.run("document.querySelector('#end').hidden")
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") == 390
        judged = browser.run("state.judged")
        browser.click("#undo")
        page.wait(judged - 1)
        assert browser.run("document.documentElement.scrollWidth") == 390
        boxes = browser.run("sides.map(side => side.getBoundingClientRect().toJSON())")
        assert boxes[0]["bottom"] <= boxes[1]["top"] and boxes[1]["bottom"] < 844  # one above the other
        browser.click("#second")
        page.wait(judged)
        page.close()
        # Without a server, and at the address of the former one, a pick cannot arrive.
        assert [error for error in browser.errors() if "Failed to load resource" not in error] == []
    picks = [json.loads(line) for line in (folder / "picks.jsonl").read_text().splitlines()]
    assert sum("undo" in pick for pick in picks) == 2 and sum("pick" in pick for pick in picks) == judged + 2
