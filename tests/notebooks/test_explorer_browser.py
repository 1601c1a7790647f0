"""The explorer in a real JupyterLab, driven by Chromium: open, run all, move, see it follow.

Run are the cells of the notebook that the explorer needs; CONKI_BROWSER_WHOLE=1 runs them all.
CONKI_SCREENSHOTS names a folder for pictures of what the browser showed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "02_contrastive_pairs.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PATIENCE = 400_000  # milliseconds; a loaded machine starts kernels slowly

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
if not Path(CHROMIUM).exists():
    pytest.skip("no chromium on PATH or at /usr/bin/chromium", allow_module_level=True)


def _needed(source: str) -> bool:
    start = ("profile: str", "from conki_lib.config", "import math", "if not headless()")
    return source.startswith(start)


def _copy_notebook(folder: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if not os.environ.get("CONKI_BROWSER_WHOLE"):
        notebook.cells = [c for c in notebook.cells if c.cell_type == "code" and _needed(c.source)]
        assert len(notebook.cells) == 4, "parameters, configuration, setup, explorer"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / "lesson.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the notebook in a JupyterLab whose figures go to a temporary project."""
    folder = tmp_path_factory.mktemp("lab")
    _copy_notebook(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "--ServerApp.root_dir": folder, "--ServerApp.port": port, "--ServerApp.ip": "127.0.0.1",
        "--IdentityProvider.token": "lesson",
        "--LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    options = [f"{name}={value}" for name, value in settings.items()]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CONKI_HEADLESS"},
        "CONKI_HOME": str(folder), "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(folder / "c"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options],
        cwd=folder, env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/api", server, folder / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/lesson.ipynb?token=lesson&reset"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def _wait_until_up(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator["sync_api.Page"]:
    """The notebook, open and run from its first cell to its last."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1800})
        page.set_default_timeout(PATIENCE)
        here = lab.split("/lab")[0]
        page.route("**/*", lambda r: r.continue_() if r.request.url.startswith(here) else r.abort())
        page.goto(lab)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.get_by_text(re.compile(r"Python 3 \(ipykernel\) \| Idle")).wait_for()
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        page.wait_for_selector("g.row", state="attached")
        yield page
        browser.close()


def _expect_counts(page: "sync_api.Page", **counts: int) -> None:
    """Wait for the table: it arrives after the matrix, in a message of its own."""
    for name, count in counts.items():
        row = page.locator("tr", has=page.locator(f"b:text-is('{name}')"))
        cell = row.locator("td").nth(2)
        sync_api.expect(cell).to_have_text(str(count), timeout=PATIENCE)


def _control(page: "sync_api.Page", label: str) -> "sync_api.Locator":
    return page.locator(".widget-inline-hbox", has=page.locator(f"label:text-is('{label}')"))


def _shoot(page: "sync_api.Page", name: str) -> None:
    if folder := os.environ.get("CONKI_SCREENSHOTS"):
        page.locator("g.row").first.scroll_into_view_if_needed()
        page.screenshot(path=f"{folder}/{name}.png")


def test_the_panel_shows_the_appendix_example(page: "sync_api.Page") -> None:
    assert page.locator("g.row").count() == 18
    _expect_counts(page, P1=18, P2=18, N1=81, N2=36)
    _shoot(page, "explorer-start")


def test_moving_a_label_changes_counts_and_matrix(page: "sync_api.Page") -> None:
    before = page.locator("g.row").first.inner_html()
    handle = _control(page, "y of 2").locator(".noUi-handle")
    handle.focus()
    for _ in range(4):  # 0.8 -> 0.4: another class than sample 1
        handle.press("ArrowLeft")
    page.wait_for_function("document.body.innerText.includes('classes r(y): +1, +0, -2')")
    _expect_counts(page, P2=0, N2=54)
    page.wait_for_function(
        "before => document.querySelector('g.row').innerHTML !== before", arg=before
    )
    _shoot(page, "explorer-label-moved")


def test_a_switch_empties_a_set_and_more_samples_bring_rows(page: "sync_api.Page") -> None:
    page.locator("label.widget-label-basic, .widget-checkbox label", has_text="N1").first.click()
    _expect_counts(page, N1=0)
    handle = _control(page, "samples").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('g.row').length === 24")
    _expect_counts(page, N1=0, P1=24)
    _shoot(page, "explorer-four-samples")


def test_choosing_a_row_lists_its_pairs_and_the_pointer_finds_them_too(
    page: "sync_api.Page",
) -> None:
    _control(page, "row").locator("select").select_option("A_v^1")
    page.locator("th:text-is('with A_v^1')").wait_for()
    pairs = page.locator("table", has_text="with A_v^1")
    sync_api.expect(pairs).to_contain_text("A_t^1, A_a^1", timeout=PATIENCE)
    title = page.locator("g.row title").nth(4)
    assert title.inner_html().startswith("A_v^1\nP1: A_t^1, A_a^1")


def test_descent_moves_the_vectors_and_lowers_the_loss(page: "sync_api.Page") -> None:
    def loss() -> float:
        return float(re.search(r"L_con = ([\d.]+)", page.inner_text("body")).group(1))

    before = loss()
    page.locator("button", has_text="descend").click()
    page.wait_for_function(f"!document.body.innerText.includes('L_con = {before:.4f}')")
    assert loss() < before
    _shoot(page, "explorer-descended")
