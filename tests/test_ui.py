"""MLflow's UI in a real browser: both runs stand in the table."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import machine, train_config
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from servers import running
from test_pipeline import copy_project, environment

from sdpipe.data.store import DataSet
from sdpipe.training.session import train_run

pytestmark = pytest.mark.slow

# Headless, as root in a container too, without the browser's own requests to its maker.
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1500,800",
)  # fmt: skip


@pytest.fixture
def ui(project: Path, dataset: DataSet) -> Iterator[str]:
    """`make ui` on a store with two trainings; the address."""
    for run, p_L in (("stochastic", 0.5), ("constant", 1.0)):
        train_run(run, train_config(p_L=p_L), machine(), dataset, "code", project / "models" / run)
    copy_project(project)

    # -o: the packages are installed here already, so that no .venv is made.
    def command(port: int) -> list[str | Path]:
        return ["make", "-o", ".venv/installed", "ui", f"PORT={port}"]

    with running(command, "health", env=environment(), cwd=project) as address:
        yield address


def test_both_runs_stand_in_the_table(ui: str, tmp_path: Path) -> None:
    """The page that people open; a screenshot is kept where SDPIPE_SCREENSHOT says."""
    options = Options()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get(f"{ui}/#/experiments/1/runs?workflowType=machine_learning")
        page = WebDriverWait(browser, 60)
        for run in ("stochastic", "constant"):
            page.until(lambda found, run=run: found.find_elements(By.XPATH, f"//*[text()='{run}']"))
        browser.save_screenshot(os.environ.get("SDPIPE_SCREENSHOT", str(tmp_path / "ui.png")))
    finally:
        browser.quit()
