"""Which alpha a published log was written with: what its radii allow."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

from smoothkit.certify.bounds import clopper_pearson_lower
from smoothkit.types import ABSTAIN, check_alpha, check_samples, check_sigma

_DISTINCT_NEEDED = 3  # distinct large radii below which two values of alpha can fit by chance
_TOP = 2_000  # votes missing from n up to which radii could be resolved; 76 suffice at n = 100,000
ALPHAS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


# --- the alpha that radii fit --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class AlphaFinding:
    """Which alphas the radii of a log are possible for.

    `table` is that of `consistent_alphas`. `resolvable` radii, `distinct` of them different, could tell.
    `consistent` is empty when they are too few or when no candidate fits. `sentence` says it in words.
    """

    claimed: float
    consistent: tuple[float, ...]
    resolvable: int
    distinct: int
    table: pd.DataFrame
    sentence: str

    @property
    def alpha(self) -> float | None:
        """The claimed alpha where the radii fit it, else the only one that they fit, else None."""
        if self.claimed in self.consistent:
            return self.claimed
        return self.consistent[0] if len(self.consistent) == 1 else None

    @property
    def text(self) -> str:
        """Short form for a table cell, such as `0.01 (claimed 0.001)`."""
        if self.claimed in self.consistent:
            return f"{self.claimed:g}"
        fitting = " or ".join(f"{alpha:g}" for alpha in self.consistent)
        return f"{fitting or '?'} (claimed {self.claimed:g})"


def consistent_alphas(
    radii: np.ndarray, sigma: float, n: int = 100_000, candidates: Sequence[float] = ALPHAS
) -> pd.DataFrame:
    """How many of the large radii of a log are possible for each alpha.

    With n samples only n + 1 radii exist, sigma * Phi^-1(p_k) with p_k the Clopper-Pearson bound of k votes.
    Near k = n they lie further apart than the printed digits, so a printed radius shows whether it is one of them.

    Parameters
    ----------
    radii : array of shape (images,)
        Radii as logged, units of sigma; zeros are ignored. Radii that all have three significant digits are taken
        as rounded to nearest; others as rounded either way at their last decimal, the sixth at most.
    sigma : float
        Noise level, pixel units on [0, 1].
    n : int
        Samples for estimation.
    candidates : sequence of float
        Values of alpha to try.

    Returns
    -------
    DataFrame
        A row a candidate: alpha, cap (the radius of n votes out of n), fit and resolvable (numbers of radii;
        resolvable ones are the same for all candidates), fraction.
    """
    check_sigma(sigma)
    check_samples("n", n)
    radii = np.asarray(radii, dtype=np.float64)
    radii = radii[radii > 0]
    low, high = _windows(radii)
    lattices = {alpha: sigma * _unit_lattice(n, alpha) for alpha in candidates}
    resolvable = _resolvable(radii, high - low, lattices)
    low, high, total = low[resolvable], high[resolvable], int(resolvable.sum())
    rows = []
    for alpha, lattice in lattices.items():
        fit = int((np.searchsorted(lattice, high, "right") > np.searchsorted(lattice, low, "left")).sum())
        rows.append((alpha, lattice[-1], fit, total, fit / total if total else np.nan))
    return pd.DataFrame(rows, columns=["alpha", "cap", "fit", "resolvable", "fraction"])


def _windows(radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of true radii that print as each logged one."""
    slack = 1e-9 * np.abs(radii)  # the ends of an interval belong to it
    if all(float(f"{r:.3g}") == r for r in radii):
        half = 0.5 * 10.0 ** (np.floor(np.log10(radii) + 1e-12) - 2)
    else:
        half = 10.0 ** -next((d for d in range(3, 6) if np.allclose(np.round(radii, d), radii, rtol=0, atol=1e-9)), 6)
    return radii - half - slack, radii + half + slack


@functools.lru_cache(maxsize=64)
def _unit_lattice(n: int, alpha: float) -> np.ndarray:
    """The largest attainable radii at sigma = 1, ascending, those above 0."""
    check_alpha(alpha)
    k = np.arange(max(n // 2, n - _TOP), n + 1)
    z = special.ndtri(clopper_pearson_lower(k, n, alpha))
    return z[z > 0] if (z > 0).any() else np.zeros(1)


def _resolvable(radii: np.ndarray, width: np.ndarray, lattices: dict[float, np.ndarray]) -> np.ndarray:
    """Radii where attainable ones lie further apart than the printed digits, whichever alpha was used."""
    wide = np.ones(radii.shape, dtype=bool)
    for lattice in lattices.values():
        if len(lattice) < 2:
            continue
        above = np.clip(np.searchsorted(lattice, radii), 1, len(lattice) - 1)
        wide &= (lattice[above] - lattice[above - 1] > width) & (radii >= lattice[0])
    return wide


def infer_alpha(log_table: pd.DataFrame, sigma: float, n: int = 100_000, claimed: float = 0.001) -> AlphaFinding:
    """Say which alpha the radii of a log were computed for.

    Parameters
    ----------
    log_table : DataFrame
        With columns predict and radius, as in `Log.table`.
    sigma, n : float, int
        Noise level and samples for estimation of the log.
    claimed : float
        The alpha that the log's paper or README states.

    Returns
    -------
    AlphaFinding
        A rejected alpha is rejected for certain, given n and sigma: some radius is impossible for it. An alpha that
        fits need not be the one used. With fewer than three distinct large radii nothing is concluded.
    """
    check_alpha(claimed)
    radii = log_table.loc[log_table["predict"] != ABSTAIN, "radius"].to_numpy(np.float64)
    radii = radii[radii > 0]
    candidates = tuple(sorted({*ALPHAS, claimed}))
    table = consistent_alphas(radii, sigma, n, candidates)
    low, high = _windows(radii)
    clear = _resolvable(radii, high - low, {alpha: sigma * _unit_lattice(n, alpha) for alpha in candidates})
    resolvable, distinct = int(clear.sum()), len(np.unique(radii[clear]))
    consistent = ()
    if distinct >= _DISTINCT_NEEDED:
        consistent = tuple(table.loc[table["fit"] == table["resolvable"], "alpha"].tolist())
    top = float(radii[clear].max()) if resolvable else 0.0
    sentence = _alpha_sentence(table, consistent, claimed, sigma=sigma, n=n, top=top, distinct=distinct)
    return AlphaFinding(claimed, consistent, resolvable, distinct, table, sentence)


def _alpha_sentence(
    table: pd.DataFrame,
    consistent: tuple[float, ...],
    claimed: float,
    *,
    sigma: float,
    n: int,
    top: float,
    distinct: int,
) -> str:
    by_alpha = table.set_index("alpha")
    total = int(table["resolvable"].iloc[0])
    if distinct < _DISTINCT_NEEDED:
        return f"too few large radii to tell alpha ({total} that could, {distinct} distinct)"
    fitting = " or ".join(f"{alpha:g}" for alpha in consistent)
    if claimed in consistent:
        return f"{total} large radii fit alpha = {fitting} at n = {n:,}"
    own = by_alpha.loc[claimed]
    if top * (1 - 0.0051) > own["cap"]:  # 0.5 in the third digit at most
        because = f"{top:g} at sigma {sigma:g} is above the cap {own['cap']:.3g} of alpha {claimed:g}"
    else:
        because = f"{int(own['fit'])} of {total} fit alpha {claimed:g}"
    if not consistent:
        return f"largest radii fit no alpha tried at n = {n:,}: {because}"
    return f"largest radii fit alpha = {fitting}, not {claimed:g}: {because} (n = {n:,})"
