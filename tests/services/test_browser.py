"""MLflow's pages after a sweep, as a person sees them in Chromium."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from service_fixtures import TOP, begin

RANKS = (2, 4, 8)
PICTURES = TOP / "outputs" / "screenshots"

# The one element of a kind whose whole text is the given one.
_BY_TEXT = (
    "return [...document.querySelectorAll(arguments[0])]"
    ".find(e => e.innerText.trim().startsWith(arguments[1]))"
)
# A line of the tree of columns, and in it the arrow or the box.
_IN_TREE = (
    "const line = [...document.querySelectorAll('[class*=tree-treenode]')]"
    ".find(e => e.innerText.trim().startsWith(arguments[0]));"
    "return line && line.querySelector(arguments[1])"
)
# Header and rows of the table, whose cells lie in several containers, by the name of the column.
_TABLE = """
const cells = {};
for (const cell of document.querySelectorAll('.ag-row [col-id]')) {
  const row = cell.closest('.ag-row').getAttribute('row-index');
  (cells[row] ??= {})[cell.getAttribute('col-id')] = cell.innerText.trim();
}
return Object.keys(cells).sort().map(row => cells[row]);
"""
# For every line chart: its title's card text, and names and lengths of the curves that are drawn.
_CURVES = """
return [...document.querySelectorAll('.js-plotly-plot')]
  .filter(plot => plot.data[0] && plot.data[0].type === 'scatter')
  .map(plot => ({
    title: plot.closest('[data-testid="experiment-view-compare-runs-card"]')?.innerText
      ?? plot.parentElement.parentElement.innerText,
    drawn: plot.querySelectorAll('.scatterlayer .trace path.js-line').length,
    names: [...new Set(plot.data.map(curve => curve.name))],
    points: Math.max(...plot.data.map(curve => curve.x.length)),
  }));
"""


@dataclass(frozen=True)
class Swept:
    url: str
    page: str
    """The page that `python -m runner.ui` prints for the sweep."""
    experiment: str
    runs: list[Any]
    """The children as MLflow's API has them, by rank."""


@pytest.fixture(scope="module")
def swept_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A sweep of three ranks, and the UI on it."""
    cwd = tmp_path_factory.mktemp("swept")
    ranks = ",".join(map(str, RANKS))
    process = begin(
        cwd, {}, "-m", "experiment=rehearsal", f"network.rank={ranks}", "training.epochs=12"
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    with subprocess.Popen(
        [sys.executable, "-m", "runner.ui", "--outputs", str(cwd / "outputs"), "--port", "5200"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
    ) as ui:
        assert ui.stdout is not None
        try:
            lines: list[str] = []
            while not lines or not lines[-1].startswith("Newest sweep"):
                lines.append(ui.stdout.readline())
                assert lines[-1], lines
            yield opened(cwd / "outputs", lines)
        finally:
            ui.send_signal(signal.SIGINT)
            ui.stdout.read()


def opened(outputs: Path, lines: list[str]) -> Swept:
    """What the UI's lines and MLflow's API say of the sweep below `outputs`."""
    from runner.tracking.client import connect
    from runner.tracking.mlflow_store import sqlite_uri

    page = lines[-1].split()[-1]
    url, experiment = re.findall(r"(http://\S+?)/#/experiments/(\d+)", page)[0]
    client = connect(sqlite_uri(outputs))
    runs = [run for run in client.search_runs([experiment]) if "network.rank" in run.data.params]
    runs.sort(key=lambda run: int(run.data.params["network.rank"]))
    assert [int(run.data.params["network.rank"]) for run in runs] == list(RANKS)
    return Swept(url, page, experiment, runs)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(1240, 1100) as found:
        yield found


def tidy(browser: Browser) -> None:
    """Close the assistant's panel and the menu, which MLflow opens beside every page."""
    for button in ("mlflow.assistant.chat_panel.close", "mlflow_header.toggle_sidebar_button"):
        browser.click(f"return document.querySelector('[data-component-id=\"{button}\"]')")
    browser.wait_for("return !document.querySelector('[data-component-id$=\"chat_panel.close\"]')")


# The experiment's table shows the three ranks and their losses, as MLflow's API has them.
def test_the_table_shows_ranks_and_losses(swept_keys: Swept, browser: Browser) -> None:
    browser.open(swept_keys.page.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    browser.wait_for_text("3 matching runs")
    tidy(browser)
    browser.click(_BY_TEXT, "button", "Columns")
    for column in ("Dataset", "Source", "Models"):  # room for the others
        browser.click(_IN_TREE, column, "[class*=tree-checkbox]")
    for branch, column in (("Metrics (", "eval/loss"), ("Parameters (", "network.rank")):
        browser.wait_for(_IN_TREE, branch, "[class*=tree-switcher]")
        if not browser.run(_IN_TREE, column, "[class*=tree-checkbox]"):
            browser.click(_IN_TREE, branch, "[class*=tree-switcher]")
        time.sleep(1)  # it unfolds slowly
        browser.click(_IN_TREE, column, "[class*=tree-checkbox]")
    browser.click(_BY_TEXT, "button", "Columns")
    rows = browser.wait_for(
        f"const rows = (() => {{{_TABLE}}})();"
        "return rows.length === 3 && rows.every(row => Object.values(row).length > 4) && rows"
    )
    browser.picture(PICTURES / "table.png")
    shown = [[text for key, text in row.items() if re.search("loss|rank", key)] for row in rows]
    best_first = sorted(swept_keys.runs, key=lambda run: run.data.metrics["eval/loss"])
    for row, run in zip(shown, best_first, strict=True):
        rank = run.data.params["network.rank"]
        [loss] = [text for text in row if text != rank]
        assert rank in row, rows
        assert float(loss) == pytest.approx(run.data.metrics["eval/loss"], rel=1e-3), rows
    print(f"the table: {shown}")


# The page that compares the sweep shows three curves of the loss, one for each rank, with a
# point for each step, and the three evaluation losses.
def test_the_compare_page_shows_three_curves(swept_keys: Swept, browser: Browser) -> None:
    browser.open("about:blank")
    browser.open(swept_keys.page)
    browser.wait_for_text("eval/loss", "loss/average", "3 matching runs")
    names = {run.info.run_name for run in swept_keys.runs}
    charts = browser.wait_for(
        f"const charts = (() => {{{_CURVES}}})();"
        "return charts.length >= 3 && charts.every(chart => chart.drawn >= 3) && charts"
    )
    for chart in charts:
        assert set(chart["names"]) == names, chart
    steps = max(chart["points"] for chart in charts)
    client_steps = swept_keys.runs[0].data.metrics
    assert "loss/current" in client_steps
    page = browser.text()
    for run in swept_keys.runs:
        assert f"{run.data.metrics['eval/loss']:.2f}" in page
    browser.picture(PICTURES / "compare.png")
    print(f"{len(charts)} line charts of three curves each, up to {steps} points a curve")


# A run's page lists its LoRA files, and what MLflow gives for them is what the run wrote.
def test_the_run_page_lists_the_lora_files(swept_keys: Swept, browser: Browser) -> None:
    run = swept_keys.runs[-1]
    base = f"{swept_keys.url}/#/experiments/{swept_keys.experiment}/runs/{run.info.run_id}"
    browser.open(f"{base}/artifacts")
    shown = browser.wait_for_text("lora.safetensors", "lora_comfyui.safetensors", "train.toml")
    assert run.info.run_name in shown
    browser.click(_BY_TEXT, "[role=tree] *, li, [class*=tree] *", "train.toml")
    browser.wait_for_text("network_dim")
    browser.picture(PICTURES / "run.png")
    folder = Path(run.data.tags["run.folder"])
    record = json.loads((folder / "run.json").read_text())
    assert record["mlflow_run_id"] == run.info.run_id
    for name in ("lora.safetensors", "lora_comfyui.safetensors"):
        size = browser.run(
            "const ask = new XMLHttpRequest();"
            "ask.open('GET', arguments[0], false); ask.send();"
            "return [ask.status, Number(ask.getResponseHeader('content-length'))]",
            f"{swept_keys.url}/get-artifact?path={name}&run_uuid={run.info.run_id}",
        )
        assert size == [200, (folder / name).stat().st_size], name
