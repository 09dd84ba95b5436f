"""Picks in a browser: keys, clicks, a restart, a prompt with HTML, and the phone's layout."""

import json

import pytest
from tools.pairing.browser import CHROMIUM, Browser, served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")


def test_keys_clicks_a_restart_and_a_phone(folder, tmp_path):
    manifest = (folder / "manifest.jsonl").read_text()
    html = "<img src=x onerror=alert(1)>"
    (folder / "manifest.jsonl").write_text(manifest.replace('"prompt": "a"', f'"prompt": "{html}"'))
    with Browser(tmp_path / "profile") as browser:

        def wait(judged):
            browser.wait(f"!busy && state.judged === {judged}")

        with served(folder, browser):
            assert browser.run("document.querySelector('#prompt span').textContent") == html
            assert browser.run("document.querySelectorAll('#prompt img').length") == 0
            for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowUp")):
                browser.press(key)
                wait(number + 1)
            browser.click("#first img")
            wait(4)
            browser.press("u")
            wait(3)
        browser.press("ArrowLeft")
        browser.wait("!document.querySelector('#told').hidden")  # no answer, and no pick
        with served(folder, browser):
            assert browser.run("state.judged") == 3
            while browser.run("state.pair !== null"):
                judged = browser.run("state.judged")
                browser.press("ArrowLeft")
                wait(judged + 1)
            assert not browser.run("document.querySelector('#end').hidden")
            browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
            assert browser.run("document.documentElement.scrollWidth") == 390
            browser.click("#undo")
            wait(judged)
            assert browser.run("document.documentElement.scrollWidth") == 390
            boxes = browser.run("sides.map(side => side.getBoundingClientRect().toJSON())")
            assert boxes[0]["bottom"] <= boxes[1]["top"] and boxes[1]["bottom"] < 844  # one above the other
            browser.click("#second")
            wait(judged + 1)
        # Without a server, and at the address of the former one, a pick cannot arrive.
        assert [error for error in browser.errors() if "Failed to load resource" not in error] == []
    picks = [json.loads(line) for line in (folder / "picks.jsonl").read_text().splitlines()]
    assert sum("undo" in pick for pick in picks) == 2 and sum("pick" in pick for pick in picks) == judged + 3


def test_the_ranking_opens_at_its_beginning(folder, tmp_path):
    with Browser(tmp_path / "profile", height=400) as browser, served(folder, browser):
        browser.click("#ranking")
        browser.wait("document.querySelector('#sheet').open")
        scrolled, height, shown = browser.run("(s => [s.scrollTop, s.scrollHeight, s.clientHeight])($('#sheet'))")
        assert scrolled == 0 and height > shown
        browser.screenshot(tmp_path / "ranking.png")
        assert browser.errors() == []
