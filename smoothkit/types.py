"""The few things every part of the package speaks of: votes, certificates, stopping rules."""

import dataclasses
import html
import math
from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np

ABSTAIN = -1
FINEST_ROUNDED = 256  # steps a sigma; for finer grids noise is drawn exactly
MOST_SAMPLES = 10**9  # of one image; with blocks of 10,000 a record has a hundred thousand then


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """When sampling stops, fixed before it starts.

    `fixed` draws `n0` samples to select a class and `n` further ones to estimate its probability, and
    looks once. `alpha` is the failure probability the record was planned for; with one look at a fixed
    n, other values of alpha may be read off the same votes.

    The sequential kinds `hybrid`, `kt` and `staged` decide whether each of the `radii` is certified, look
    after each number of estimation samples in `looks` (the last is `n`), and stop an image when all radii
    are decided. `beta` bounds the chance of giving a radius up wrongly, which costs power only.

    The kind `radius` has `within` instead of radii: it stops an image at the first look at which sampling
    on to `n` would lengthen the certified radius by no more than `within` (pixel units, like sigma). That it
    would not is wrong with a chance of at most `beta`, which costs length only.

    `skip_wrong` does not sample an image whose selected class is not its label: enough for certified
    accuracy, and no statement about the class.
    """

    n0: int
    n: int
    alpha: float
    kind: str = "fixed"
    radii: tuple[float, ...] = ()
    looks: tuple[int, ...] = ()
    beta: float | None = None
    skip_wrong: bool = False
    within: float | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_samples("n0", self.n0)
        check_samples("n", self.n)
        object.__setattr__(self, "radii", tuple(float(r) for r in self.radii))
        object.__setattr__(self, "looks", tuple(int(t) for t in self.looks))
        if self.kind not in RULE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(RULE_KINDS)}, got {self.kind!r}")
        if self.kind == "fixed":
            if self.radii or self.looks or self.beta is not None or self.skip_wrong or self.within is not None:
                raise ValueError("a fixed rule has no radii, looks, beta, skip_wrong or within")
            return
        check_alpha(self.beta, "beta")
        self._check_aim()
        looks = self.looks
        if not looks or looks[0] < 1 or list(looks) != sorted(set(looks)) or looks[-1] != self.n:
            raise ValueError(f"looks must be increasing sample counts that end at n={self.n}, got {looks}")

    def _check_aim(self) -> None:
        if self.kind == "radius":
            if self.radii:
                raise ValueError(f"the kind 'radius' finds radii and is given none, got radii={self.radii}")
            check_within(self.within)
            object.__setattr__(self, "within", float(self.within))
            return
        if self.within is not None:
            raise ValueError(f"within={self.within} goes with the kind 'radius' only, got kind={self.kind!r}")
        if not self.radii or min(self.radii) < 0 or list(self.radii) != sorted(set(self.radii)):
            raise ValueError(f"radii must be increasing and at least 0, got {self.radii}")

    def edges(self) -> list[int]:
        """Edges of the blocks of estimation samples, from 0 to n."""
        return [0, *self.looks] if self.looks else block_edges(self.n)


RULE_KINDS = ("fixed", "hybrid", "kt", "staged", "radius")


def block_edges(n: int) -> list[int]:
    """The fixed grid of blocks up to n: 0, 100, 1,000, 10,000, 20,000, ... and n itself."""
    check_samples("n", n)
    edges = [0, 100, 1_000, *range(10_000, n, 10_000)]
    return [e for e in edges if e < n] + [n]


@dataclasses.dataclass(frozen=True)
class NoiseForm:
    """How noise is added: float noise (`grid` None), noise rounded to a grid, or noise drawn exactly on it.

    `grid` is the number of steps from 0 to 1. As text, in records and arguments: "float", "grid:255", "exact-grid:255".
    """

    grid: int | None
    exact: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.grid, (int, np.integer)) and not isinstance(self.grid, bool)
        if self.grid is not None and not (whole and 1 <= self.grid < 2**24):
            raise ValueError(f"a grid must have 1 to {2**24 - 1:,} steps, got {self.grid!r}")
        if self.exact and self.grid is None:
            raise ValueError("noise drawn exactly needs a grid, got none")

    @classmethod
    def parse(cls, noise: "str | NoiseForm | None", grid: int | None = None, *, sigma: float = 0.0) -> "NoiseForm":
        """The noise that an argument asks for.

        Parameters
        ----------
        noise : str, NoiseForm or None
            "grid" or "exact-grid" (the data's own), "grid:255" or "exact-grid:255" (so many steps), "float", or None: the
            data's grid where it has one (drawn exactly on it if it is too fine for rounded noise), else float noise
        grid : the data's own number of steps from 0 to 1, or None
        sigma : the noise level, by which a grid is fine or not

        Raises
        ------
        ValueError
            For other words, or for the data's grid where it has none.
        """
        if noise is None or isinstance(noise, NoiseForm):
            return noise or cls(grid, exact=grid is not None and sigma * grid > FINEST_ROUNDED)
        kind, colon, steps = noise.partition(":") if isinstance(noise, str) else ("", "", "")
        if noise in ("float", "unstated"):
            return cls(None)
        if kind not in ("grid", "exact-grid") or (colon and not (steps.isascii() and steps.isdigit())):
            hint = f"; did you mean 'grid:{noise}'?" if isinstance(noise, int) and not isinstance(noise, bool) else ""
            raise ValueError(
                f"noise must be grid, exact-grid, grid:STEPS, exact-grid:STEPS or float, got {noise!r}{hint}"
            )
        if not colon and grid is None:
            raise ValueError(
                f"noise={noise!r} needs data that declares a grid, and these images declare none; use 'float'"
            )
        return cls(int(steps) if colon else grid, exact=kind == "exact-grid")

    def check(self, sigma: float) -> None:
        """Refuse float noise rounded to so fine a grid that its rounding shows; see `certify.bounds.sigma_of_proof`."""
        if self.grid is not None and not self.exact and sigma * self.grid > FINEST_ROUNDED:
            raise ValueError(
                f"noise '{self}' at sigma={sigma:g} has {sigma * self.grid:,.0f} steps a sigma, and above {FINEST_ROUNDED} "
                f"rounded float noise tells even values from odd ones; use noise='exact-grid:{self.grid}'"
            )

    def __str__(self) -> str:
        return "float" if self.grid is None else f"{'exact-' if self.exact else ''}grid:{self.grid}"


@dataclasses.dataclass(frozen=True, eq=False)
class Votes:
    """Class counts over `n` noisy copies of one image.

    `counts` is int64 of shape (num_classes,). A copy on which the base classifier gave NaN votes for
    nobody and still counts, so `counts.sum()` may be below `n`.
    """

    counts: np.ndarray
    n: int

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        if counts.ndim != 1 or counts.size == 0 or not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"counts must be integers of shape (num_classes,), got {counts.dtype} {counts.shape}")
        if counts.min() < 0 or counts.sum() > self.n:
            raise ValueError(f"counts must be at least 0 and sum to at most n={self.n}, got {counts.tolist()}")
        object.__setattr__(self, "counts", counts.astype(np.int64))

    def __add__(self, other: "Votes") -> "Votes":
        return Votes(self.counts + other.counts, self.n + other.n)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Votes) and self.n == other.n and np.array_equal(self.counts, other.counts)

    @property
    def top(self) -> int:
        """The class with most votes; ties go to the lowest."""
        return int(self.counts.argmax())

    def ranked(self, most: int = 6) -> list[tuple[str, int]]:
        """(who, votes) for the classes with most votes, then for all others, then for copies that voted for nobody."""
        order = [int(c) for c in np.argsort(-self.counts, kind="stable") if self.counts[c]]
        shown = [(f"class {c}", int(self.counts[c])) for c in order[:most]]
        rest, silent = int(self.counts[order[most:]].sum()), self.n - int(self.counts.sum())
        return shown + [(who, k) for who, k in (("other classes", rest), ("nobody", silent)) if k]

    def __repr__(self) -> str:
        return f"Votes(n={self.n:,}: {', '.join(f'{who} {k:,}' for who, k in self.ranked()) or 'none'})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left">{who}</td><td>{k:,}</td><td style="text-align:left">'
            f'<div style="background:#0072b2;height:.8em;width:{180 * k / self.n:.1f}px"></div></td></tr>'
            for who, k in self.ranked()
        )
        return f"<table><caption>{self.n:,} noisy copies</caption>{rows}</table>"


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A claim about the smoothed classifier at one image, wrong with probability at most alpha.

    `predicted` is a class, or ABSTAIN with radius 0.0. No perturbation of `norm` size below `radius` changes the
    prediction of the smoothed classifier; where noise lies on a grid, none that stays on the grid, and no real one below
    `radius_for_all` (None where it is not known). The base classifier is the one that was run, as `run` says: its
    precision, compute batch, form and device. `seed` is the seed of the noise if it was fixed beforehand.
    """

    predicted: int
    radius: float
    sigma: float
    n0: int
    n: int
    alpha: float
    p_a_lower: float
    n_a: int
    noise: str = "unstated"
    norm: str = "L2"
    rule: str = "fixed"
    class_name: str | None = None
    radius_for_all: float | None = None
    seed: int | None = None
    run: str = ""

    @property
    def abstained(self) -> bool:
        return self.predicted == ABSTAIN

    def sentence(self) -> str:
        """The certificate in words; radii are rounded down."""
        if self.abstained:
            return (
                f"No answer: {self.n_a:,} of {self.n:,} votes do not put one class above one half "
                f"with {_confidence(self.alpha)} (sigma = {self.sigma:g}{self._asides()})."
            )
        reach = round_down(self.radius)
        if "grid" in self.noise:
            reach += f" on the 1/{self.noise.partition(':')[2]} grid"
            if self.radius_for_all is not None:
                reach += f", or {round_down(self.radius_for_all)} off it,"
        return (
            f"With {_confidence(self.alpha)} no change of {self.norm} size below {reach} moves this prediction: "
            f"{self.class_name or f'class {self.predicted}'} "
            f"(sigma = {self.sigma:g}, {self.n_a:,} of {self.n:,} votes{self._asides()})."
        )

    def _asides(self) -> str:
        asides = ["float noise, whose rounding can show the image to a classifier made for it"] * (
            self.noise == "float"
        )
        asides += [] if self.seed is None else [f"seed {self.seed}, fixed beforehand"]
        return "".join(f", {aside}" for aside in asides) + (f"; as run: {self.run}" if self.run else "")

    def _repr_html_(self) -> str:
        settings = f"n0 = {self.n0:,}, n = {self.n:,}, alpha = {self.alpha:g}, rule {self.rule}"
        settings += f", p_A at least {round_down(self.p_a_lower, 4)}"
        return f"<p>{html.escape(self.sentence())}<br><small>{html.escape(settings)}</small></p>"


def _confidence(alpha: float) -> str:
    """99.9% confidence; where a percentage would be all nines, 1 - 1e-12 confidence. It is never 100%."""
    return f"{100 * (1 - alpha):.10g}% confidence" if alpha >= 1e-9 else f"1 - {alpha:g} confidence"


def round_down(value: float, digits: int = 3) -> str:
    """A radius as text with `digits` decimals, never above it: 0.9996 is "0.999". The one way a radius is shown.

    It works on the shortest decimal that gives the float back, so that 0.29 is "0.29" and a text read is written again.
    What is not finite stays as Python writes it: where only one class can be answered, a radius is infinite.
    """
    if not math.isfinite(value):
        return repr(float(value))
    step = Decimal(1).scaleb(-digits)
    return str(Decimal(repr(float(value))).quantize(step, rounding=ROUND_FLOOR, context=Context(prec=400)))


# --- checks of arguments, shared by all who take them ------------------------------------------------


def check_alpha(alpha: float | None, name: str = "alpha") -> None:
    if not (isinstance(alpha, (int, float, np.floating)) and 0 < alpha < 1):
        hint = f"; did you mean {1 - alpha / 100:g}?" if isinstance(alpha, (int, float)) and 1 < alpha < 100 else ""
        raise ValueError(f"{name} must lie in (0, 1), got {alpha!r}{hint}")


def check_sigma(sigma: float, name: str = "sigma") -> None:
    if not (isinstance(sigma, (int, float, np.floating)) and 0 < sigma < math.inf):
        raise ValueError(f"{name} must be a finite number above 0 (pixel units on [0, 1]), got {sigma!r}")
    if sigma > 20:
        raise ValueError(f"{name} must be in pixel units on [0, 1], got {sigma!r}; did you mean {sigma / 255:.3g}?")


def check_within(within: float | None) -> None:
    number = isinstance(within, (int, float, np.floating)) and not isinstance(within, bool)
    if not (number and 0 < within < math.inf):
        raise ValueError(f"within must be a finite number above 0 (pixel units, as sigma), got {within!r}")


def check_samples(name: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {n!r}")
    if n > MOST_SAMPLES:
        raise ValueError(f"{name} must be at most {MOST_SAMPLES:,}, got {n:,}; no bound gains from more")
