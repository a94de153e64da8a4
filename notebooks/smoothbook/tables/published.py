"""Published tables and the logs behind them: Cohen et al. 2019, cell by cell, with its known misprints."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.reading import ReportError, certified_accuracy, read_log

# --- Cohen's tables ------------------------------------------------------------------------------------

# Published to two decimals: analysis/latex/vary_noise_{cifar10,imagenet} of the code released with Cohen, Rosenfeld
# and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019 (the paper's tables of certified
# accuracy, ResNet-110 and ResNet-50); ImageNet at radius 0 from the README there. Keys: dataset, sigma (equal in
# training and certification); a cell for each of COHEN_RADII, "-" where nothing is published.
COHEN_PUBLISHED: dict[str, dict[float, str]] = {
    "cifar10": {
        0.12: "-    0.59 0.00 0.00 0.00 0.00 0.00",
        0.25: "-    0.60 0.43 0.27 0.00 0.00 0.00",
        0.50: "-    0.55 0.41 0.32 0.23 0.15 0.09",
        1.00: "-    0.39 0.34 0.28 0.22 0.17 0.14",
    },
    "imagenet": {
        0.25: "0.67 0.49 0.00 0.00 0.00 0.00 0.00",
        0.50: "0.57 0.46 0.37 0.29 0.00 0.00 0.00",
        1.00: "0.44 0.38 0.33 0.26 0.19 0.15 0.12",
    },
}

COHEN_RADII = {"cifar10": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), "imagenet": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)}
_COHEN_MODEL = {"cifar10": "resnet110", "imagenet": "resnet50"}


@dataclasses.dataclass(frozen=True)
class Misprint:
    """A published number that the published logs contradict: where it stands, what it says, what they say."""

    where: str
    printed: str
    logs_say: str


KNOWN_MISPRINTS = (
    Misprint("README of the released code, ImageNet sigma 0.50, radius 1.0", "0.38", "0.372, so 0.37"),
    Misprint("README of the released code, ImageNet sigma 0.50, radius 1.5", "0.28", "0.286, so 0.29"),
    Misprint(
        "README of the released code, CIFAR-10 table (commented out)",
        "13 of its 18 cells above 0 differ, such as 0.24 for sigma 0.25 at radius 0.75",
        "0.266, so 0.27; the released logs do not give that table",
    ),
    Misprint(
        "Table 1 of the paper, ImageNet radius 2.0",
        "sigma 0.50, standard accuracy 57%",
        "sigma 1.00, standard accuracy 44%: sigma 0.50 cannot reach 2.0; the 19% is sigma 1.00",
    ),
    Misprint("ImageNet sigma 0.25", "a row like the others, of 500 images", "427 images: 0.67 and 0.49 are over 427"),
)


def cohen_log(root: str | Path, dataset: str, *, trained: float, sigma: float, split: str = "test") -> Path:
    """Where the released logs of Cohen et al. keep the certification of a model trained with one sigma at another."""
    if dataset not in _COHEN_MODEL:
        raise ReportError(f"dataset must be one of {', '.join(_COHEN_MODEL)}, got {dataset!r}")
    model = _COHEN_MODEL[dataset]
    return Path(root) / "certify" / dataset / model / f"noise_{trained:.2f}" / split / f"sigma_{sigma:.2f}"


def cohen_tables(root: str | Path) -> pd.DataFrame:
    """Cohen's tables of certified accuracy from the released logs, beside what was published.

    Parameters
    ----------
    root : str or Path
        The folder of the logs, which holds `certify/`.

    Returns
    -------
    DataFrame
        A row a cell: dataset, sigma, radius, measured, published (float, NaN where nothing was), rows (images in the
        log), agrees (to two decimals, rounded to nearest; NA where nothing was published).
    """
    if not (Path(root) / "certify").is_dir():
        raise ReportError(f"{root} has no folder certify; name the folder with the logs released by Cohen et al. 2019")
    cells = []
    for dataset, by_sigma in COHEN_PUBLISHED.items():
        for sigma, published in by_sigma.items():
            table = read_log(cohen_log(root, dataset, trained=sigma, sigma=sigma), sigma=sigma).table
            accuracy = certified_accuracy(table, COHEN_RADII[dataset])
            for r, measured, text in zip(COHEN_RADII[dataset], accuracy, published.split(), strict=True):
                agrees = pd.NA if text == "-" else f"{measured:.2f}" == text
                printed = np.nan if text == "-" else float(text)
                cells.append((dataset, sigma, r, measured, printed, len(table), agrees))
    names = ["dataset", "sigma", "radius", "measured", "published", "rows", "agrees"]
    return pd.DataFrame(cells, columns=names).astype({"agrees": "boolean"})
