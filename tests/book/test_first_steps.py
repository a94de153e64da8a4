"""The way from the README to the certificate of one's own picture: three cells, in the README and in 00_start_here."""

import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from smoothkit import data
from smoothkit.types import Certificate


@pytest.fixture
def four(tmp_path, monkeypatch):
    """A picture of a four as somebody might have it: 64 pixels wide, in colour, in the current folder."""
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits")
    pixels = (digits[list(digits.labels).index(4)][0].numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save("four.png")


def test_the_readme_certifies_it(four, capsys):
    section = (ROOT / "README.md").read_text().split("## Your own model, your own picture")[1]
    code = re.search(r"```python\n(.*?)```", section, flags=re.S)[1]
    assert len(code.split("\n\n")) <= 3 and "four.png" in code
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    promise = (
        r"no change of L2 size below (0\.\d{3}) on the 1/255 grid, or (0\.\d{3}) off it, moves this prediction: 4 "
    )
    on_grid, off_grid = re.search(f"With 99\\.9% confidence {promise}", said).groups()
    assert 0 < float(off_grid) <= float(on_grid)


def test_three_cells_of_the_first_notebook_certify_it(four):
    """Its imports and parameters, then the cells below "A picture of your own", and nothing between."""
    cells = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4).cells
    at = next(i for i, cell in enumerate(cells) if "## A picture of your own" in cell.source)
    three = [cell.source for cell in cells[at + 1 : at + 4]]
    assert all(cell.cell_type == "code" for cell in cells[at + 1 : at + 4])
    namespace = {}
    for source in [cells[1].source, cells[2].source, 'picture = "four.png"', *three[:2]]:
        exec(compile(source, "00_start_here", "exec"), namespace)
    certificate = eval(compile(three[2].splitlines()[-1], "00_start_here", "eval"), namespace)
    assert isinstance(certificate, Certificate)
    assert certificate.predicted == 4 and certificate.class_name == "4" and certificate.radius > 0
