"""JupyterLab in a real browser: controls by key, drag and typed value, a reload, no error, no request to elsewhere.

Screenshots are kept under runs/browser.
"""

import nbformat
import numpy as np
import pytest

from smoothkit import data, plots
from smoothkit.panels.curve import certificate_table, read_counts
from smoothkit.records import open_record

from .lab import ROOT

pytestmark = pytest.mark.slow
SIGMAS = ("0.12", "0.25", "0.50")


@pytest.fixture(scope="module")
def counts():
    records = data.data_dir() / "records"
    found = (read_counts(open_record(records / f"digits-vit-{s}-sigma-{s}")) for s in SIGMAS)
    return {c.sigma: c for c in found}


def assert_plotted(figure: dict, counts: dict) -> None:
    """The curves in the page are those of the alpha and n that the figure names, to the last step."""
    alpha, n = figure["meta"]["alpha"], figure["meta"]["n"]
    assert figure["title"] == f"Certified accuracy at alpha = {alpha:.3g}, n = {n:,}"
    for trace, (sigma, c) in zip(figure["data"], counts.items(), strict=True):
        exact = plots.certified_accuracy_points({sigma: certificate_table(c, alpha=alpha, n=n)})
        assert trace["name"] == f"σ = {sigma:g}"
        assert np.allclose(trace["x"], exact["radius"], rtol=1e-12, atol=0)
        assert np.allclose(trace["y"], exact["certified_accuracy"], rtol=1e-12, atol=0)


class Follow:
    """Do something, wait until the figure in view has other settings and has settled, and return it."""

    def __init__(self, page) -> None:
        self.page = page

    def __call__(self, action, seconds: float = 30, until=lambda figure: True) -> dict:
        before = self.page.figure()["meta"]
        action()
        self.page.wait_until(lambda: self._moved(before, until), seconds, "the figure to follow")
        last = None
        while last != self.page.figure():
            last = self.page.figure()
            self.page.page.wait_for_timeout(700)
        return last

    def _moved(self, before: dict, until) -> bool:
        now = self.page.figure()
        return now is not None and now["meta"] != before and until(now)


def assert_clean(page) -> None:
    assert page.errors == [] and page.outside == []


def test_a_dark_page(notebook, counts):
    """The explorer in the dark theme, for the eye; its words take the theme's colours."""
    page = notebook("dark.ipynb", of="50_radius_explorer.ipynb")
    page.theme("Dark")
    page.run_until("explorer.show()")
    page.wait_until(lambda: page.figure() is not None, 120, "the first panel")
    page.page.wait_for_timeout(1000)
    assert_plotted(page.figure(), counts)
    page.shot("explorer-dark")
    assert page.contrast(".jupyter-widgets p") > 4.5
    page.theme("Light")  # it is kept for the pages to come
    assert_clean(page)


def test_the_radius_explorer(notebook, counts):
    page = notebook("50_radius_explorer.ipynb")
    page.run_all(600)
    page.page.locator(".smoothkit-figure").first.scroll_into_view_if_needed()
    page.wait_until(lambda: page.figure() is not None, 60, "the first panel")
    follow = Follow(page)
    assert_plotted(page.figure(), counts)
    page.shot("explorer-curve")

    # alpha: by key, by drag, by a typed number
    keyed = follow(lambda: page.press("alpha", "ArrowRight", 4))
    assert keyed["meta"]["alpha"] > 0.001
    assert_plotted(keyed, counts)
    dragged = follow(lambda: page.drag("alpha", -50))
    assert dragged["meta"]["alpha"] < keyed["meta"]["alpha"]
    assert_plotted(dragged, counts)
    typed = follow(lambda: page.type_value("alpha", "0.02"))
    assert typed["meta"]["alpha"] == 0.02
    assert_plotted(typed, counts)
    # n: the same; a number between two edges takes the lower
    keyed = follow(lambda: page.press("n", "ArrowLeft"))
    assert keyed["meta"]["n"] == 1_000
    assert_plotted(keyed, counts)
    dragged = follow(lambda: page.drag("n", -150))
    assert dragged["meta"]["n"] == 100
    assert_plotted(dragged, counts)
    typed = follow(lambda: page.type_value("n", "5000"))
    assert typed["meta"]["n"] == 1_000
    assert_plotted(typed, counts)
    # radii: the brush, by key and by drag, and across the curve itself
    page.press("radii", "ArrowRight", 30, handle=1)
    page.wait_until(lambda: page.page.locator("text=certificates end between").count() > 0, 20, "the brush")
    page.drag("radii", 25, handle=0)
    page.page.wait_for_timeout(1500)
    page.shot("explorer-brush")
    plot = page.page.locator(".smoothkit-figure .nsewdrag").first.bounding_box()
    page.page.mouse.move(plot["x"] + 0.5 * plot["width"], plot["y"] + 80)
    page.page.mouse.down()
    page.page.mouse.move(plot["x"] + 0.6 * plot["width"], plot["y"] + 120, steps=6)
    page.page.mouse.up()
    page.page.wait_for_timeout(2000)
    low, high = brushed = page.brush()
    assert 0.3 < low < high < 0.7
    page.shot("explorer-brushed-by-mouse")

    # the page forgets nothing
    before = page.figure()
    page.reload()
    page.wait_until(lambda: page.figure() is not None, 90, "the figure after the reload")
    after = page.figure()
    assert after["meta"] == before["meta"] == {"alpha": 0.02, "n": 1_000}
    assert_plotted(after, counts)
    assert page.number("alpha") == 0.02 and page.number("n") == 1_000 and page.brush() == brushed
    page.shot("explorer-reloaded")
    moved = follow(lambda: page.press("alpha", "ArrowLeft", 2))
    assert moved["meta"]["alpha"] < 0.02
    assert_plotted(moved, counts)

    image_panel(page)
    slice_panel(page)
    attack_panel(page)
    compare_panel(page)
    assert_clean(page)


def turn_to(page, name: str, settings: str) -> Follow:
    page.page.get_by_role("button", name=name, exact=True).first.click()
    page.wait_until(
        lambda: page.figure() is not None and settings in (page.figure()["meta"] or {}), 60, f"the {name} panel"
    )
    page.page.wait_for_timeout(800)
    return Follow(page)


def image_panel(page) -> None:
    follow = turn_to(page, "image", "radius")
    page.shot("explorer-image")
    typed = follow(lambda: page.type_value("alpha", "0.05"))
    assert typed["meta"]["alpha"] == 0.05 and typed["meta"]["radius"] > 0
    keyed = follow(lambda: page.press("sigma", "ArrowRight", 5))
    assert keyed["meta"]["n"] == 0 and keyed["meta"]["sigma"] > 0.25
    sampled = follow(
        lambda: page.page.get_by_role("button", name="Sample").click(), 60, lambda f: f["meta"]["n"] == 2_000
    )
    bars = next(t for t in sampled["data"] if t["name"] == "votes")
    assert abs(sum(bars["y"]) - 1) < 1e-9
    page.shot("explorer-image-sampled")
    dragged = follow(lambda: page.drag("sigma", 40))
    assert dragged["meta"]["sigma"] > keyed["meta"]["sigma"] and dragged["meta"]["n"] == 0
    typed = follow(lambda: page.type_value("sigma", "0.25"))
    assert typed["meta"]["sigma"] == 0.25


def slice_panel(page) -> None:
    follow = turn_to(page, "slice", "direction")
    page.wait_until(lambda: page.figure()["meta"]["side"] == 16, 120, "the coarse grid")
    page.shot("explorer-slice")
    typed = follow(lambda: page.type_value("alpha", "0.05"))
    assert typed["meta"]["alpha"] == 0.05 and typed["meta"]["side"] == 16
    keyed = follow(lambda: page.press("n", "ArrowLeft"))
    assert keyed["meta"]["n"] == 50 and keyed["meta"]["radius"] < typed["meta"]["radius"]
    sampled = follow(lambda: page.press("sigma", "ArrowRight", 10), 120, lambda f: f["meta"]["side"] == 16)
    assert sampled["meta"]["sigma"] > 0.25
    regions = [t for t in sampled["data"] if t["name"] == "regions"]
    assert [len(t["z"]) for t in regions] == [64, 16]
    page.shot("explorer-slice-sigma")


def attack_panel(page) -> None:
    follow = turn_to(page, "attack", "attacked")
    page.shot("explorer-attack")
    dragged = follow(lambda: page.drag("alpha", 60))
    assert dragged["meta"]["alpha"] > 0.001
    points = next(t for t in dragged["data"] if t["name"] == "attack succeeds here")
    assert points["x"] and all(y > x for x, y in zip(points["x"], points["y"], strict=True))
    keyed = follow(lambda: page.press("reach", "ArrowLeft", 2))
    assert not keyed["meta"]["attacked"]


def compare_panel(page) -> None:
    follow = turn_to(page, "compare", "first")
    page.shot("explorer-compare")
    keyed = follow(lambda: page.press("n", "ArrowLeft"))
    assert sum(len(t["x"]) for t in keyed["data"] if t["name"].startswith(("longer", "neither"))) == 360


def test_start_here(notebook):
    page = notebook("00_start_here.ipynb")
    page.run_all(400)
    text = page.page.locator(".jp-Notebook").inner_text()
    assert "Not yet: no answer yet: replace the dots" in text and "no change of L2 size below" in text
    drawn = page.page.evaluate("() => document.querySelectorAll('.jp-Notebook .js-plotly-plot .main-svg').length")
    assert drawn >= 3
    page.page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
    page.shot("start-here")
    page.page.locator(".js-plotly-plot").nth(2).scroll_into_view_if_needed()
    page.shot("start-here-curve")
    assert_clean(page)


def test_a_memory_takes_clicks(notebook):
    """The panel of 30_sigma_selection: a click into the plane is a question, answered by the ball it falls in."""
    cells = nbformat.read(ROOT / "notebooks" / "30_sigma_selection.ipynb", 4).cells
    (panel,) = [cell.source for cell in cells if "MemoryPanel([" in cell.source]
    imports = "from smoothkit.panels import base as panels\nfrom smoothkit.panels.memory import MemoryPanel"
    page = notebook("memory.ipynb", cells=(f"{imports}\nfigures_dir = ''", panel))
    page.run_all(200)
    page.page.locator(".smoothkit-figure").first.scroll_into_view_if_needed()
    page.wait_until(lambda: page.figure() is not None, 60, "the panel")
    assert page.figure()["title"].startswith("2 questions")
    box = page.page.locator(".smoothkit-figure .nsewdrag").first.bounding_box()
    page.page.mouse.click(box["x"] + 0.66 * box["width"], box["y"] + 0.5 * box["height"])  # near (4, 2), in a ball
    page.wait_until(lambda: page.figure()["title"].startswith("3 questions"), 20, "the click to be answered")
    page.shot("memory-clicked")
    assert_clean(page)
