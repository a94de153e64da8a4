"""JupyterLab in a real browser: controls by key, drag and typed value, a reload, no error, no request to elsewhere.

Screenshots are kept under runs/browser.
"""

import nbformat
import numpy as np
import pytest

from smoothbook import figures
from smoothbook.panels.curve import read_counts
from smoothkit import data
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
        exact = figures.certified_accuracy_points({sigma: c.certificates(alpha=alpha, n=n)})
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

    for figure in (
        *all_ways(follow, "alpha", key="ArrowRight", pixels=-50, typed=0.02),
        *all_ways(follow, "n", key="ArrowLeft", pixels=-150, typed=5000, taken=1_000),  # the block's edge below it
    ):
        assert_plotted(figure, counts)
    # radii: the brush, by key, by drag, by two numbers, and across the curve itself
    page.press("radii", "ArrowRight", 30, handle=1)
    page.wait_until(lambda: page.page.locator("text=certificates end between").count() > 0, 20, "the brush")
    page.drag("radii", 25, handle=0)
    page.page.wait_for_timeout(1500)
    page.shot("explorer-brush")
    page.type_value("radii", "0.20 – 0.40")
    page.wait_until(lambda: np.allclose(page.brush(), (0.2, 0.4)), 20, "the brush typed")
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


def all_ways(follow, label: str, *, key: str, pixels: int, typed: float, taken=None, **how) -> tuple[dict, dict, dict]:
    """Move a slider by key, by drag and by a typed number; the figure follows each time, and is returned."""
    page = follow.page
    start = follow.page.figure()["meta"][label]
    keyed = follow(lambda: page.press(label, key), **how)
    assert np.sign(keyed["meta"][label] - start) == {"ArrowRight": 1, "ArrowLeft": -1}[key]
    dragged = follow(lambda: page.drag(label, pixels), **how)
    assert np.sign(dragged["meta"][label] - keyed["meta"][label]) == np.sign(pixels)
    written = follow(lambda: page.type_value(label, f"{typed:g}"), **how)
    assert written["meta"][label] == (typed if taken is None else taken)
    return keyed, dragged, written


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
    *_, typed = all_ways(follow, "alpha", key="ArrowRight", pixels=40, typed=0.05)
    assert typed["meta"]["radius"] > 0
    for figure in all_ways(follow, "sigma", key="ArrowRight", pixels=40, typed=0.4):
        assert figure["meta"]["n"] == 0  # other noise: its votes are still to be drawn
    sampled = follow(
        lambda: page.page.get_by_role("button", name="Sample").click(), 60, lambda f: f["meta"]["n"] == 2_000
    )
    bars = next(t for t in sampled["data"] if t["name"] == "votes")
    assert abs(sum(bars["y"]) - 1) < 1e-9
    page.shot("explorer-image-sampled")


def slice_panel(page) -> None:
    follow = turn_to(page, "slice", "direction")
    page.wait_until(lambda: page.figure()["meta"]["side"] == 16, 120, "the coarse grid")
    page.shot("explorer-slice")
    *_, typed = all_ways(follow, "alpha", key="ArrowRight", pixels=40, typed=0.05)
    fewer, *_ = figures = all_ways(follow, "n", key="ArrowLeft", pixels=-200, typed=70, taken=50)
    assert fewer["meta"]["n"] == 50 and fewer["meta"]["radius"] < typed["meta"]["radius"]
    assert all(figure["meta"]["side"] == 16 for figure in figures)  # of votes that are there
    sampled = all_ways(
        follow, "sigma", key="ArrowRight", pixels=30, typed=0.35, seconds=120, until=lambda f: f["meta"]["side"] == 16
    )[-1]
    regions = [t for t in sampled["data"] if t["name"] == "regions"]
    assert [len(t["z"]) for t in regions] == [64, 16]
    page.shot("explorer-slice-sigma")


def attack_panel(page) -> None:
    follow = turn_to(page, "attack", "attacked")
    page.shot("explorer-attack")
    for figure in (
        *all_ways(follow, "alpha", key="ArrowRight", pixels=60, typed=0.002),
        *all_ways(follow, "n", key="ArrowLeft", pixels=-200, typed=5000, taken=1_000),
    ):
        points = next(t for t in figure["data"] if t["name"] == "attack succeeds here")
        assert points["x"] and all(y > x for x, y in zip(points["x"], points["y"], strict=True))
    for figure in all_ways(follow, "reach", key="ArrowLeft", pixels=-40, typed=0.7):
        assert not figure["meta"]["attacked"]


def compare_panel(page) -> None:
    follow = turn_to(page, "compare", "first")
    page.shot("explorer-compare")
    for figure in (
        *all_ways(follow, "alpha", key="ArrowRight", pixels=60, typed=0.01),
        *all_ways(follow, "n", key="ArrowLeft", pixels=200, typed=500, taken=100),
    ):
        assert sum(len(t["x"]) for t in figure["data"] if t["name"].startswith(("longer", "neither"))) == 360


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
    imports = "from smoothbook.panels import base as panels\nfrom smoothbook.panels.memory import MemoryPanel"
    page = notebook("memory.ipynb", cells=(f"{imports}\nfigures_dir = ''", panel))
    page.run_all(200)
    page.page.locator(".smoothkit-figure").first.scroll_into_view_if_needed()
    page.wait_until(lambda: page.figure() is not None, 60, "the panel")
    assert page.figure()["title"].startswith("2 questions")
    box = page.page.locator(".smoothkit-figure .nsewdrag").first.bounding_box()
    page.page.mouse.click(box["x"] + 0.66 * box["width"], box["y"] + 0.5 * box["height"])  # near (4, 2), in a ball
    page.wait_until(lambda: page.figure()["title"].startswith("3 questions"), 20, "the click to be answered")
    page.shot("memory-clicked")
    all_ways(Follow(page), "radius", key="ArrowRight", pixels=30, typed=0.8)
    assert_clean(page)
