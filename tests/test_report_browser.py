"""A report in a browser: how it lies on a phone and on a desk, sorting and filtering, without scripts, hostile names.

One headless Chromium opens the report in three frames and says in JSON what it sees in each. Where no Chromium is
installed (Debian: the package `chromium`) these tests are skipped; what the page says is tested without it too.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from report_material import material, write
from test_report import NASTY

pytestmark = pytest.mark.xdist_group("browser")  # one process, so that the browser starts once

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 240  # until a browser on a busy machine is given up
FRAMES = {  # width in pixels, and what the frame may do
    "phone": (360, "allow-same-origin allow-scripts"),
    "desk": (1200, "allow-same-origin allow-scripts"),
    "plain": (360, "allow-same-origin"),
}
LOOK = """
const column = (table, n) =>
  [...table.tBodies[0].rows].filter((row) => row.offsetHeight > 0).map((row) => row.cells[n].textContent);
function look(frame) {
  const page = frame.contentDocument, inner = frame.contentWindow.innerWidth;
  const boxes = (element) => element.getBoundingClientRect();
  const beyond = (element) => boxes(element).right > inner + 0.5 || boxes(element).left < -0.5;
  const free = [...page.querySelectorAll("main *")].filter((element) => !element.parentElement.closest(".scroll"));
  const seen = {
    inner, width: page.scrollingElement.scrollWidth,
    sticking: free.filter(beyond).map((element) => element.tagName),
    captions: page.querySelectorAll("figcaption").length,
    scripts: page.scripts.length, images: page.images.length, hostile: window.hostile === undefined ? null : "ran",
    text: page.body.innerText, buttons: page.querySelectorAll("thead button").length,
    paper: getComputedStyle(page.body).backgroundColor,
    drawn: [...page.querySelectorAll("svg")].map((svg) => Math.round(svg.getBoundingClientRect().width)),
  };
  const table = page.querySelector("figure.sortable table"), head = table.tHead.rows[0];
  seen.rows = column(table, 0);
  if (!seen.buttons) return seen;
  seen.sorted = [];
  const place = [...head.cells].findIndex((cell) => cell.textContent.startsWith("perplexity"));
  for (const n of [place, place, place, place + 1, 0]) {
    const button = head.cells[n].querySelector("button");
    button.focus();
    button.click();
    const marks = [...head.cells].map((cell) => cell.getAttribute("aria-sort"));
    seen.sorted.push([column(table, n), marks[n], marks.filter(Boolean).length, page.activeElement === button]);
  }
  const field = page.querySelector("figure.sortable input");
  seen.filtered = [];
  for (const words of ["HC_SMOE 33", "33 % 22.00", "nothing", ""]) {
    field.value = words;
    field.dispatchEvent(new Event("input"));
    seen.filtered.push([column(table, 0).length, page.querySelector("figure.sortable output").textContent]);
  }
  table.tBodies[0].querySelector("a").click();
  seen.opened = [...page.querySelectorAll("details")].map((one) => one.open);
  return seen;
}
addEventListener("load", () => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) seen[frame.id] = look(frame);
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser sees of a report whose names are hostile, by frame."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: `apt install chromium` lets these tests run")
    folder: Path = tmp_path_factory.mktemp("browser")
    page = write(folder / "report.html", material(NASTY, f"org/{NASTY}")).read_text()
    frames = "".join(
        f'<iframe id="{name}" sandbox="{sandbox}" style="width: {width}px; height: 800px; border: 0" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for name, (width, sandbox) in FRAMES.items()
    )
    opened = folder / "frames.html"
    opened.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><script>{LOOK}</script>{frames}<pre id="seen"></pre>', encoding="utf-8"
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", opened.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"HOME": str(folder)}
    )
    found = re.search(r'<pre id="seen">(.+?)</pre>', run.stdout, re.S)
    assert found is not None, run.stderr[-2000:]
    document: dict[str, Any] = json.loads(html.unescape(found[1]))
    return document


@pytest.mark.parametrize("frame", FRAMES)
def test_the_page_fits_its_window_and_cuts_no_caption(seen: dict[str, Any], frame: str) -> None:
    here = seen[frame]
    assert here["inner"] == FRAMES[frame][0]
    assert here["width"] <= here["inner"]
    assert here["sticking"] == []  # wide tables and figures scroll in their boxes
    assert here["captions"] > 10


def test_figures_keep_a_readable_size_on_a_phone(seen: dict[str, Any]) -> None:
    phone, desk = seen["phone"]["drawn"], seen["desk"]["drawn"]
    assert len(phone) == len(desk) >= 9
    for small, large in zip(phone, desk, strict=True):
        assert min(large, 600) <= small + 1 <= large + 1


def test_heads_sort_a_table_and_say_so(seen: dict[str, Any]) -> None:
    for frame in ("phone", "desk"):
        rising, falling, own, ratio, name = seen[frame]["sorted"]
        values = [float(cell.split(" [")[0]) for cell in own[0]]
        assert [float(cell.split(" [")[0]) for cell in rising[0]] == sorted(values) != values[::-1]
        assert [float(cell.split(" [")[0]) for cell in falling[0]] == sorted(values, reverse=True)
        assert [rising[1], falling[1], own[1]] == ["ascending", "descending", None]
        assert [rising[2], falling[2], own[2], ratio[2], name[2]] == [1, 1, 0, 1, 1]  # one column at a time
        assert ratio[0][-1] == "–"  # what has no value comes last
        assert name[0] == sorted(name[0])
        assert all(step[3] for step in (rising, falling, own, ratio, name))  # the keyboard reaches it


def test_words_filter_rows(seen: dict[str, Any]) -> None:
    assert seen["desk"]["filtered"] == [[1, "1 of 3 rows"], [1, "1 of 3 rows"], [0, "0 of 3 rows"], [3, ""]]


def test_a_rows_name_leads_to_its_command(seen: dict[str, Any]) -> None:
    assert sum(seen["desk"]["opened"]) == 1


def test_tables_are_complete_without_scripts(seen: dict[str, Any]) -> None:
    plain, desk = seen["plain"], seen["desk"]
    assert plain["buttons"] == 0 < desk["buttons"]
    assert plain["rows"] == desk["rows"]
    assert len(plain["rows"]) == 3


def test_hostile_names_run_nothing(seen: dict[str, Any]) -> None:
    for here in seen.values():
        assert (here["hostile"], here["scripts"], here["images"]) == (None, 1, 0)
        assert NASTY.strip() in here["text"]
