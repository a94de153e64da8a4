"""How often certificates are false, against exact probabilities, and attacks on certified digits: `make coverage`.

A certificate is false if it claims more than is true of the smoothed classifier: its class is not the top one, or its
radius is beyond sigma * Phi^-1(p) of the class's true probability p, the exact radius where the classifier is a
half-space. For a cascade the theorem's radius at the true probabilities stands for the exact one, which is no smaller.
Everything is certified at alpha far above the usual, or at p where mistakes are likeliest, so that there is something to count.

A kind fails if so many false certificates had a chance below `FALSE_ALARM` although each is false with alpha at most.
`noticed` is the rate that would have failed with a chance of 0.99.
"""

import argparse
import sys
import time

import numpy as np
import pandas as pd
import torch
from results import keep
from scipy import optimize, special, stats
from torch import nn

from smoothbook.sigma.selectors import SmoothedSelector, sound_certificates
from smoothbook.training.attacks import into_ball, norms, soft_smoothed_loss
from smoothkit import Purpose, Smoothed, data, models, noisy_copies
from smoothkit.certify import certificates, predict_votes, sequential_rule
from smoothkit.certify.betting import decision_probabilities
from smoothkit.certify.bounds import clopper_pearson_lower, clopper_pearson_upper
from smoothkit.certify.cascade import cascade_radii, certify_cascade
from smoothkit.certify.sequential import boundaries, claims
from smoothkit.records import ESTIMATE, SELECT, Identity, Record, Row, open_record
from smoothkit.types import ABSTAIN, StoppingRule, Votes, block_edges

FALSE_ALARM = 1e-6
ROUNDED = 1e-7  # what float32 pixels and thresholds may add to a distance
SIGMA = 0.25


def judged(kind: str, case: str, alpha: float, issued: int, false: int, exact: float | None = None) -> dict:
    """A row: how many were false, the exact limit of their rate, and whether that can be chance at alpha."""
    return {
        "certificate": kind,
        "case": case,
        "alpha": alpha,
        "issued": issued,
        "false": false,
        "rate": false / issued,
        "exact": exact,
        "upper": float(clopper_pearson_upper(false, issued, 0.05)),
        "chance": float(stats.binom.sf(false - 1, issued, alpha)),
        "noticed": _noticed(issued, alpha),
        "kept": bool(stats.binom.sf(false - 1, issued, alpha) >= FALSE_ALARM),
    }


def _noticed(issued: int, alpha: float) -> float:
    """The rate of false certificates at which the test fails with a chance of 0.99."""
    threshold = stats.binom.isf(FALSE_ALARM, issued, alpha) + 1
    return float(optimize.brentq(lambda p: stats.binom.sf(threshold - 1, issued, p) - 0.99, alpha, 1 - 1e-12))


# --- votes drawn from probabilities -------------------------------------------------------------------


def drawn_record(rng: np.random.Generator, p: np.ndarray, rule: StoppingRule, images: int) -> Record:
    """A record in memory whose votes follow the class probabilities p; every block of the rule is there."""
    record = Record(
        None,
        Identity("drawn", "test", "all", "p", "p", len(p), SIGMA, 0, "float", "float32", rule),
    )
    blocks = [(SELECT, a, b) for a, b in zip(block_edges(rule.n0)[:-1], block_edges(rule.n0)[1:], strict=True)]
    blocks += [(ESTIMATE, a, b) for a, b in zip(rule.edges()[:-1], rule.edges()[1:], strict=True)]
    for purpose, a, b in blocks:
        votes = rng.multinomial(b - a, p, size=images).tolist()
        record.append([Row(i, str(i), i, "d", 0, purpose, a, b, tuple(v)) for i, v in enumerate(votes)], {})
    return record


def false_ones(table: pd.DataFrame, p: np.ndarray) -> int:
    """Certificates that claim more than is true of a classifier with class probabilities p."""
    claimed = table[table["predict"] != ABSTAIN]
    true_radius = np.maximum(0.0, SIGMA * special.ndtri(np.minimum(p, 1 - 1e-16)))[claimed["predict"]]
    return int((claimed["radius"].to_numpy() > true_radius).sum())


PROBABILITIES = {
    "two classes at 1/2": (0.5, 0.5, 0.0),
    "two classes just below 1/2": (0.499, 0.499, 0.002),
    "p_A = 0.7": (0.7, 0.2, 0.1),
    "p_A = 0.95": (0.95, 0.03, 0.02),
    "p_A = 0.999": (0.999, 0.0005, 0.0005),
}


def fixed(rng: np.random.Generator, images: int, alpha: float = 0.01, n: int = 1_000) -> list[dict]:
    rows = []
    for case, p in PROBABILITIES.items():
        p = np.array(p)
        found = certificates(drawn_record(rng, p, StoppingRule(n0=20, n=n, alpha=alpha), images))
        k = np.arange(n + 1)
        chances = [stats.binom.pmf(k, n, q)[clopper_pearson_lower(k, n, alpha) > max(q, 0.5)].sum() for q in p]
        rows.append(judged("fixed", case, alpha, images, false_ones(found, p), float(max(chances))))
    return rows


def sequential(rng: np.random.Generator, images: int, alpha: float = 0.01, n: int = 2_000) -> list[dict]:
    """At the probability that the radius needs, where every certificate of that radius is false; then two radii."""
    rows = []
    for kind in ("hybrid", "kt", "staged"):
        for radii in ((0.0,), (0.25,), (0.1, 0.25)):
            rule = sequential_rule(radii, kind=kind, n_max=n, alpha=alpha, n0=20)
            p = float(special.ndtr(radii[0] / SIGMA))
            votes = rng.binomial(np.diff(rule.edges()), p, size=(images, len(rule.looks))).cumsum(axis=1)
            false = sum(q > p - 1e-12 and r >= radii[0] and q > 0 for q, r in claims(rule, SIGMA, list(votes)))
            up, down = boundaries(rule, SIGMA)
            exact = decision_probabilities(rule.looks, up[0], down[0], p)["certified"] if len(radii) == 1 else None
            case = f"radii {', '.join(f'{r:g}' for r in radii)} at the smallest of them"
            rows.append(judged(f"sequential, {kind}", case, alpha, images, int(false), exact))
    return rows


def to_radius(rng: np.random.Generator, images: int, alpha: float = 0.01, n: int = 2_000) -> list[dict]:
    rows = []
    for p in (0.5, 0.7, 0.95):
        rule = sequential_rule(within=0.02, n_max=n, alpha=alpha, n0=20)
        votes = rng.binomial(np.diff(rule.edges()), p, size=(images, len(rule.looks))).cumsum(axis=1)
        false = sum(r > max(0.0, SIGMA * special.ndtri(p)) for _, r in claims(rule, SIGMA, list(votes)))
        rows.append(judged("sequential, radius", f"p_A = {p:g}, all looks", alpha, images, int(false)))
    return rows


SCALES = {
    "the large scale is contested": ((0.99, 0.01, 0.0), (0.51, 0.49, 0.0), (0.5, 0.5, 0.0)),
    "the large scale says another class": ((0.95, 0.05, 0.0), (0.4, 0.45, 0.15), (0.3, 0.55, 0.15)),
    "all scales alike": ((0.8, 0.1, 0.1), (0.8, 0.1, 0.1), (0.8, 0.1, 0.1)),
    "nothing at any scale": ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
    "decided at the smallest": ((0.999, 0.001, 0.0), (0.45, 0.45, 0.1), (0.4, 0.3, 0.3)),
}


def cascades(rng: np.random.Generator, images: int, alpha: float = 0.02, n: int = 500) -> list[dict]:
    sigmas, rows = (0.25, 0.5, 1.0), []
    for rule in ("max", "cascade", "released"):
        for upper in ("classes", "runner-up"):
            for case, p in SCALES.items():
                p = np.array(p)  # [K, classes]
                drawn = [
                    np.stack([rng.multinomial(m, q, size=images) for q in p], axis=1) for m in (20, n)
                ]  # [images, K, classes]
                found = certify_cascade(*drawn, n=n, sigmas=sigmas, alpha=alpha, rule=rule, upper=upper)
                true_radius = cascade_radii(p, p, sigmas=sigmas).max(axis=0)  # [classes]
                false = (found.predict != ABSTAIN) & (found.radius > true_radius[found.predict])
                pays = alpha * len(sigmas) if rule == "released" else alpha  # what is proved for the published rule
                name = {"max": "max over k", "cascade": "cascade", "released": "cascade, released rule (3 alpha)"}[rule]
                rows.append(judged(f"{name}, {upper}", case, pays, images, int(false.sum())))
    return rows


# --- through the engine: real noise on half-spaces ------------------------------------------------------


class HalfSpace(nn.Module):
    """Class 1 where pixel `axis` is above a threshold: its certified radius is a distance."""

    def __init__(self, axis: int, threshold: float) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1)[:, self.axis] - self.threshold
        return torch.stack([-score, score], dim=1)


def points(images: int, x: float, y: float) -> data.Images:
    """Many images at one distance from both half-spaces; a third pixel that nobody looks at gives each noise of its own."""
    third = torch.linspace(0, 1, images)
    pixels = torch.stack([torch.full_like(third, x), torch.full_like(third, y), third], dim=1)
    return data.from_arrays(pixels.reshape(-1, 1, 1, 3))


def through_the_engine(images: int, alpha: float = 0.05, n: int = 300) -> list[dict]:
    rows, x, y, edge = [], 0.6, 0.6, 0.5
    shown = points(images, x, y)
    distance = x - edge + ROUNDED
    how = dict(batch=2_000, compile=False)
    for name, threshold in (("radius 0.1", edge), ("on the boundary", x)):
        d = x - threshold + ROUNDED
        record = Smoothed(HalfSpace(0, threshold), SIGMA, **how).sample(shown, n0=20, n=n, alpha=alpha, progress=False)
        found = certificates(record)
        false = (found["predict"] == 1) & (found["radius"] > d) | (found["predict"] == 0)
        rows.append(judged("fixed, through the engine", name, alpha, images, int(false.sum())))
    smoothed = Smoothed(HalfSpace(1, edge), SIGMA, **how)
    selector = SmoothedSelector(smoothed, (0.1, SIGMA), alpha=alpha / 2, n0=20, n=n, seed=1, progress=False)
    found = sound_certificates(HalfSpace(0, edge), selector, shown, n0=20, n=n, alpha=alpha, progress=False, **how)
    # two statements, that sigma stays and that the class does: alpha is paid for both together
    false = (found["sigma_radius"] > distance) | (found["class_radius"] > distance) | (found["predict"] == 0)
    rows.append(judged("sound sigma, through the engine", "sigma and class at 0.1", alpha, images, int(false.sum())))
    return rows


def prediction(rng: np.random.Generator, images: int, alpha: float = 0.01, n: int = 200) -> list[dict]:
    """PREDICT between two classes that are alike, where every answer but one is false, counted as half of them."""
    votes = rng.multinomial(n, (0.5, 0.5), size=images)
    answers = np.array([predict_votes(Votes(v, n), alpha=alpha) for v in votes])
    return [judged("predict", "two classes at 1/2, either answer", alpha, images, int((answers != ABSTAIN).sum()))]


# --- attacks -------------------------------------------------------------------------------------------


def attacks(
    digits: int,
    restarts: int,
    steps: int = 10,
    copies: int = 4,
    samples: int = 2_000,
    name: str = "digits-vit-0.25-sigma-0.25",
) -> dict:
    """PGD on the soft smoothed classifier, inside the certified ball and on the grid; judged by PREDICT on fresh noise.

    `samples` are those of PREDICT. The digits are those with the shortest certified radii, where an attack has most to
    hope for, and as many at random.
    """
    record = open_record(data.data_dir() / "records" / name)
    table = certificates(record)
    claimed = table[table["predict"] != ABSTAIN].sort_values("radius")
    rng = np.random.default_rng(0)
    weakest = claimed.iloc[: digits // 2]
    others = claimed.iloc[digits // 2 :]
    chosen = pd.concat([weakest, others.iloc[np.sort(rng.choice(len(others), digits - len(weakest), replace=False))]])
    images = data.load("digits")
    place = {image: i for i, image in enumerate(images.ids)}
    base = models.load(record.identity.model)
    smoothed = Smoothed(base, record.sigma)
    wins, shrunk = [], []
    for row in chosen.itertuples():
        image = images[place[row.image_id]]
        points = attacked(base, image, row, record, restarts=restarts, steps=steps, copies=copies, grid=images.grid)
        answers = smoothed.predict(data.from_arrays(points, grid=images.grid), n=samples, alpha=1e-6)
        shrunk.append(float(norms(points - image).max() / row.radius))
        if any(answer not in (ABSTAIN, row.predict) for answer in answers):
            wins.append(int(row.idx))
    return {
        "record": name,
        "alpha": record.stopping_rule.alpha,
        "attempts": len(chosen),
        "restarts": restarts,
        "steps": steps,
        "copies": copies,
        "successes": len(wins),
        "upper": float(clopper_pearson_upper(len(wins), len(chosen), 0.05)),
        "predict_alpha": 1e-6,
        "largest_used_of_radius": max(shrunk),
        "digits_broken": wins,
    }


def attacked(
    base, image, row, record, *, restarts: int, steps: int, copies: int, grid: int, best: int = 5
) -> torch.Tensor:
    """The `best` of all restarts [best, C, H, W], on the grid and strictly inside the certified ball."""
    generator = torch.Generator().manual_seed(int(row.idx))
    centre = image.expand(restarts, *image.shape)
    start = torch.randn(centre.shape, generator=generator)
    start *= row.radius * torch.rand(restarts, 1, 1, 1, generator=generator) / norms(start).reshape(-1, 1, 1, 1)
    start[0] = 0  # one from the image itself
    now = into_ball(centre, centre + start, row.radius)
    labels = torch.full((restarts,), int(row.predict))
    with torch.enable_grad():
        for step in range(steps):
            noise = torch.randn(copies, *centre.shape, generator=generator) * record.sigma
            now = now.detach().requires_grad_()
            loss = soft_smoothed_loss(base, now, labels, noise).sum()
            (gradient,) = torch.autograd.grad(loss, now)
            gradient /= norms(gradient).clamp_min(1e-12).reshape(-1, 1, 1, 1)
            now = into_ball(centre, now + 2 * row.radius / (step + 2) * gradient, row.radius)
    on_grid = centre + torch.trunc((now.detach() - centre) * grid) / grid  # towards the centre, so inside
    known = dict(
        sigma=record.sigma, seed=1, purpose=Purpose.ATTACK, image_id=row.image_id, start=0, stop=200, grid=grid
    )
    noise = noisy_copies(image, **known) - image  # [200, C, H, W]
    with torch.inference_mode():
        votes = [
            base((point + noise).float()).argmax(1).eq(int(row.predict)).float().mean() for point in on_grid
        ]  # of the certified class
    worst = torch.stack(votes).argsort()[:best]
    return on_grid[worst][norms(on_grid[worst] - image) < row.radius]


# --- all ------------------------------------------------------------------------------------------------


def measure(images: int, seed: int = 0) -> list[dict]:
    """All kinds; `images` certificates of each case that is drawn cheaply, fewer of the others."""
    rng = np.random.default_rng(seed)
    some = max(200, images // 5)
    return [
        *fixed(rng, some),
        *sequential(rng, some),
        *to_radius(rng, some),
        *cascades(rng, images),
        *prediction(rng, some),
        *through_the_engine(some),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--digits", type=int, default=30, help="digits that are attacked")
    parser.add_argument("--restarts", type=int, default=100)
    options = parser.parse_args()
    begin = time.perf_counter()
    torch.set_num_threads(1)
    rows = measure(options.images)
    attack = attacks(options.digits, options.restarts)
    issued, false = sum(r["issued"] for r in rows), sum(r["false"] for r in rows)
    bad = [r for r in rows if not r["kept"]]
    by_kind = pd.DataFrame(rows).groupby("certificate", sort=False)[["issued", "false"]].sum().reset_index()
    said = f"{false:,} false of {issued:,} certificates in {len(rows)} cases, {len(bad)} cases above alpha"
    keep(
        "coverage",
        begin,
        {
            "made_by": "make coverage",
            "headline": f"{said}; {attack['successes']} of {attack['attempts']} attacks succeeded",
            "false_alarm": FALSE_ALARM,
            "issued": issued,
            "false": false,
            "cases": len(rows),
            "cases_above_alpha": len(bad),
            "by_certificate": by_kind.to_dict("records"),
            "attacks": attack,
            "rows": rows,
        },
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
