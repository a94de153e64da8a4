"""Browser tests run by `make test-browser`: they take minutes, so `make test` skips them, and so do machines without a browser."""

import os
import shutil
from collections.abc import Sequence

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from .lab import FLAGS, NotebookPage, chromium, jupyter_lab

ASKED_FOR = "SMOOTHKIT_BROWSER_TESTS"


def why_not() -> str:
    if os.environ.get(ASKED_FOR, "0") in ("", "0"):
        return f"browser tests take minutes: make test-browser, or {ASKED_FOR}=1"
    if chromium() is None:
        return "no Chromium here; on Debian: apt-get install chromium; elsewhere name one in BROWSER_PATH"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return 'Playwright is missing: pip install -e ".[test]"'
    return ""


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if "tests/browser/" in item.path.as_posix() and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def notebook(browser, tmp_path_factory):
    """Opens notebooks, each in a page of its own, in one JupyterLab."""
    folder = tmp_path_factory.mktemp("lab")
    with jupyter_lab(folder) as address:
        context = browser.new_context(viewport={"width": 1280, "height": 1100})

        def opened(name: str, *, of: str | None = None, cells: Sequence[str] = ()) -> NotebookPage:
            """Open a notebook, or under this name a fresh copy of one, or one with these cells."""
            if of:
                shutil.copy(folder / "notebooks" / of, folder / "notebooks" / name)
            if cells:
                kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
                made = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=kernel)
                nbformat.write(made, folder / "notebooks" / name)
            page = NotebookPage(context, address)
            page.open(name)
            return page

        yield opened
        context.close()
