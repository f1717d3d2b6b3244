"""MLflow's UI as a person sees it, in Debian's chromium: charts, table, plots, model; pictures of all of it are kept.

They go to the folder that DEPLOYFRONT_SCREENSHOTS names, else to pytest's own.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.cli import run
from tests.helpers.searches import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
CHROMIUM = shutil.which("chromium")
_PATIENCE_MS = 120_000
_ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL without a GPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    named = os.environ.get("DEPLOYFRONT_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def links(folder, tmp_path_factory) -> Iterator[list[str]]:
    """The addresses that `search ui` gives for a finished search with a picked version, while it serves them."""
    home = tmp_path_factory.mktemp("browser")
    shutil.copytree(folder / "one", home / "runs" / "one")
    runs = ["--runs", str(home / "runs")]
    assert run(["sync", *runs]) == 0
    assert run(["pick", *runs, "--budget", "latency<1000%", "--out", str(home / "deploy")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "search", "ui", *runs, "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        lines = [server.stdout.readline() for _ in range(4)]
        yield [re.search(r"http://\S+", line)[0] for line in lines]
    finally:
        server.send_signal(signal.SIGTERM)  # in the background SIGINT may be ignored
        server.wait(30)


@pytest.fixture(scope="module")
def page(links) -> Iterator:
    """A page of a browser that reaches this machine and nothing else."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        context.set_default_timeout(_PATIENCE_MS)
        context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        yield context.new_page()
        browser.close()


def visit(page, address: str) -> None:
    page.goto(address)
    close = page.get_by_role("button", name="Close").first
    page.get_by_text("tiny").first.wait_for()
    if close.count():  # an assistant that takes a quarter of the page
        close.click()


def test_the_summary_shows_the_front_with_links_to_its_trials(links, page, screenshots) -> None:
    visit(page, links[0])
    page.get_by_text("that no other beats").first.wait_for()
    more = page.get_by_text("Show more")
    if more.count():
        more.first.click()
    page.screenshot(path=screenshots / "summary.png")
    trial = page.locator("table a[href*='/runs/']").first
    number = trial.inner_text()
    page.goto(trial.evaluate("link => link.href"))
    page.get_by_text(f"trial {number} (front)").first.wait_for()
    page.get_by_text("latency_ms").first.wait_for()
    page.screenshot(path=screenshots / "trial.png")


def test_the_report_is_drawn_without_a_network(links, page, screenshots) -> None:
    visit(page, links[1])
    inside = page.frame_locator("iframe").first
    inside.get_by_role("heading", name="Caveats").wait_for()
    inside.locator(".js-plotly-plot .main-svg").nth(4).wait_for()
    plots = inside.locator(".js-plotly-plot")
    assert plots.count() >= 5
    assert all(box["width"] > 200 and box["height"] > 200 for box in map(_box, plots.all()))
    page.screenshot(path=screenshots / "report.png")


def _box(plot) -> dict:
    plot.scroll_into_view_if_needed()
    return plot.bounding_box()


def test_charts_are_there_without_being_set_up(links, page, screenshots) -> None:
    begin = time.monotonic()
    visit(page, links[2])
    page.get_by_text("Model metrics").first.wait_for()
    for metric in ("accuracy_pct", "flops_pct_of_dense", "latency_ms"):
        page.get_by_text(metric).first.wait_for()
    page.locator(".js-plotly-plot").first.wait_for()
    seconds = time.monotonic() - begin
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "charts.png")
    assert page.locator(".js-plotly-plot").count() >= 3
    (screenshots / "charts.txt").write_text(f"the charts were there after {seconds:.1f} s\n")


def test_the_picked_version_is_in_the_registry(links, page, screenshots) -> None:
    visit(page, links[3])
    page.get_by_text("Version 1").first.wait_for()
    page.get_by_text("deploy").first.wait_for()
    page.screenshot(path=screenshots / "model.png")


def test_a_report_fits_a_page_of_its_own(folder, page, screenshots, tmp_path) -> None:
    file = tmp_path / "report.html"
    assert run(["report", "--runs", str(folder), "--search", "one", "--out", str(file), "--quiet"]) == 0
    page.goto(file.as_uri())
    page.locator(".js-plotly-plot .main-svg").nth(4).wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "page.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    overlapping = page.evaluate(_OVERLAPS)
    assert overlapping == []


_OVERLAPS = """
() => {
  const found = [];
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const selector = '.xtick text, .ytick text, .legendtext, .xtitle, .ytitle, .annotation-text';
    const shown = [...plot.querySelectorAll(selector)].filter(each => each.textContent.trim());
    const boxes = shown.map(each => [each.textContent, each.getBoundingClientRect()]);
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && high > 3) found.push(boxes[i][0] + ' / ' + boxes[j][0]);
    }
  }
  return found;
}
"""
"""Labels of plotly's that cover each other by more than the rim of their boxes."""
