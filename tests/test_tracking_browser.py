"""What a person sees of a tracked sweep in MLflow's own pages, in a real browser, by following the printed link."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracked_sweeps import Swept, finished_sweep, free_port, mlflow_server

from scaling_ray.tracking.story import read_report
from scaling_ray.tracking.tracker import replay

pytest.importorskip("mlflow.tracking")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE_MS = 120_000
"""For a page to show what it must; a loaded machine takes long over MLflow's scripts."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swept, str]]:
    """A sweep on a real server, and the link to it."""
    folder = tmp_path_factory.mktemp("told")
    swept = finished_sweep(folder)
    with mlflow_server(folder / "server", free_port()) as uri:
        report = read_report(swept.files.place.below("../report"), swept.files)
        assert report is not None
        link = replay(swept.files, swept.spec, swept.manifest, swept.runs, uri, report)
        assert link is not None
        yield swept, link


@pytest.fixture(scope="module")
def page(told: tuple[Swept, str]) -> Iterator[Any]:
    """A page of a browser without a past, one window for all tests of this module."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install 'scaling-ray[browser]'"
    )
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1600, "height": 800})
        opened.set_default_timeout(PATIENCE_MS)
        yield opened
        browser.close()


def keep_picture(page: Any, name: str) -> None:
    """A picture of the page, where SCALING_RAY_PICTURES names a folder for them."""
    folder = os.environ.get("SCALING_RAY_PICTURES")
    if folder:
        page.wait_for_timeout(3_000)
        page.screenshot(path=str(Path(folder) / f"mlflow-{name}.png"))


def run_link(page: Any, name: str) -> Any:
    """The link to a run in the table; the path above the page may name the same word."""
    return page.locator(".ag-row").get_by_role("link", name=name, exact=True)


def test_the_link_opens_a_table_with_names_and_loss_and_the_best_run_on_top(page: Any, told: tuple[Swept, str]) -> None:
    swept, link = told
    page.goto(link)
    run_link(page, "W32 5000 s1").wait_for()
    close = page.get_by_role("button", name="Close").first
    if close.is_visible():  # the assistant's panel takes a third of the window
        close.click()
    for name in ("W4 200 s1", "W8 5000 s2", "tracked"):
        assert run_link(page, name).count() == 1
    headers = [header.inner_text().strip() for header in page.locator(".ag-header-cell").all()]
    shown = [text for text in headers if text]
    for column in ("test_loss", "gain_over_gene_mean", "gain_over_gaussian", "params"):
        assert any(text.startswith(column[:12]) for text in shown), (column, shown)
    assert not any("Evaluation" in text for text in page.locator("h2, h1").all_inner_texts())
    keep_picture(page, "runs")
    rows = page.locator(".ag-center-cols-container .ag-row, .ag-pinned-left-cols-container .ag-row")
    first = page.locator('.ag-row[row-index="0"]').all_inner_texts()
    best = min(swept.runs, key=lambda run: _test_loss(swept, run.run_id))
    assert rows.count() >= 10
    assert any(f"{best.size} " in text or "tracked" in text for text in first), first
    assert any(re.search(r"0\.\d+", text) for text in first), first


def _test_loss(swept: Swept, run_id: str) -> float:
    result = swept.files.run(run_id).result()
    assert result is not None and result.test_loss is not None
    return result.test_loss


def test_the_charts_draw_loss_against_parameters_and_cells(page: Any, told: tuple[Swept, str]) -> None:
    _, link = told
    page.goto(link + "&compareRunsMode=CHART")
    page.get_by_text("params vs. test_loss").first.wait_for()
    page.locator(".scatterlayer .points path").first.wait_for(state="attached")
    assert page.locator(".scatterlayer .points path").count() >= 16
    keep_picture(page, "charts")


def test_the_parent_says_the_verdict(page: Any, told: tuple[Swept, str]) -> None:
    swept, link = told
    report = read_report(swept.files.place.below("../report"), swept.files)
    assert report is not None
    page.goto(link)
    run_link(page, "tracked").click()
    page.get_by_text(report.headline["sentences"][0][:60]).first.wait_for()
    assert page.get_by_text("verdict", exact=False).count() > 0
    assert page.get_by_text("Best run: ", exact=False).count() > 0
    keep_picture(page, "parent")


def test_the_report_opens_among_the_parents_artifacts(page: Any, told: tuple[Swept, str]) -> None:
    _, link = told
    page.goto(link)
    run_link(page, "tracked").click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html", exact=True).first.click()
    frame = page.frame_locator("iframe.mlflow-html-iframe, iframe#html, .mlflow-artifact-html-view iframe").first
    frame.get_by_text("Made-up runs around a known law").first.wait_for()
    assert frame.locator("svg").count() > 0, "the report's figures are drawn"
    keep_picture(page, "report")
