"""The report and the page of a comparison in a real browser: their script runs, search works, nothing sticks out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from made_up_run import make_run
from test_comparison import made_up

from raft_jax.report import write_comparison, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")]

# Types into the first search box, and writes down what the page then shows.
PROBE = """
const report = {errors: window.errors, wide: []};
report.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
for (const element of document.querySelectorAll("main *")) {
  const box = element.getBoundingClientRect(), inside = element.closest("svg, .scroll, table, pre, .list");
  if (box.width && !inside && box.right > document.documentElement.clientWidth + 1) report.wide.push(element.tagName);
}
const rows = document.querySelector(".rows"), search = rows.querySelector("input");
report.all = rows.querySelector("output").textContent;
search.value = WORD;
search.dispatchEvent(new Event("input"));
report.found = rows.querySelector("output").textContent;
report.shown = [...rows.querySelectorAll(".list > details.row")].map((row) => row.textContent.includes(WORD));
report.background = getComputedStyle(document.body).backgroundColor;
report.svgs = [...document.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 50).length;
const probe = document.createElement("pre");
probe.id = "probe";
probe.textContent = JSON.stringify(report);
document.body.append(probe);
"""


def dump(path: Path, width: int, *options: str) -> str:
    """The page's document after its scripts have run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1200", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def probed(path: Path, word: str, width: int, *options: str) -> dict:
    """What the probe says of a copy of the page that may run it."""
    page = path.read_text("utf-8")
    page, count = re.subn(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    assert count == 1
    head = '<script>window.errors = []; addEventListener("error", (e) => errors.push(e.message));</script>'
    probe = PROBE.replace("WORD", json.dumps(word))
    page = page.replace("<title>", f"{head}<title>", 1).replace("</body>", f"<script>{probe}</script></body>")
    copy = path.with_name("probed.html")
    copy.write_text(page, "utf-8")
    return json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', dump(copy, width, *options), re.DOTALL)[1]))


@pytest.fixture(scope="module", params=["report", "comparison"])
def page(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "report":
        return write_report(make_run(folder / "run"))
    return write_comparison(made_up(folder))


def test_its_script_runs_under_its_own_policy(page):
    assert re.search(r"<output>\d+ rows</output>", dump(page, 1400))


@pytest.mark.parametrize("width", [1400, 500])
def test_search_finds_and_nothing_sticks_out(page, width):
    report = probed(page, "travel", width)
    assert report["errors"] == [] and report["overflow"] <= 0 and report["wide"] == []
    assert report["svgs"] >= 4
    total = int(report["all"].split()[0])
    match = re.fullmatch(rf"(\d+) of {total} rows", report["found"])
    assert match and 0 < int(match[1]) < total
    assert all(report["shown"]) and len(report["shown"]) == min(8, int(match[1]))


def test_it_is_dark_where_the_reader_wants_that(page):
    light = probed(page, "travel", 1400)["background"]
    dark = probed(page, "travel", 1400, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")["background"]

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))

    assert brightness(light) > 600 and brightness(dark) < 200
