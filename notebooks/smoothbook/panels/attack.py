"""Attacks against certificates: PGD on the smoothed classifier, and the radius as a line that it must not cross.

An attack counts when the smoothed classifier, asked with noise that the attack has not seen, answers another class.
One that succeeds closer to the image than its certified radius contradicts the certificate: it is asked again with
more and fresh noise, and if it stands, shown in red and kept as a case.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import traitlets
from plotly.subplots import make_subplots
from torch import Tensor

from smoothbook import figures
from smoothbook.panels.base import LABEL, AlphaControl, EdgeControl, Panel, linked, note, row, thumbnail
from smoothbook.panels.curve import read_counts
from smoothbook.panels.job import Job
from smoothbook.training.attacks import PGD, norms
from smoothkit import Purpose, Smoothed
from smoothkit.data import Images, from_arrays
from smoothkit.kernels.noise import standard_normal
from smoothkit.kernels.philox import fresh_seed
from smoothkit.records import Record
from smoothkit.types import ABSTAIN, round_down

COPIES = 8  # noisy copies an attack sees
STEPS = 10
ASKED, ASKED_AGAIN = 200, 2_000  # samples of PREDICT on an attacked image, and before a crossing is believed
CROSSING, DARK = "#D55E00", "#1F2933"  # an attack that crossed a radius, as in panel.css; one that did not


@dataclasses.dataclass(frozen=True, eq=False)
class Broken:
    """The nearest attacked image that the smoothed classifier answers otherwise."""

    distance: float
    instead: int
    attacked: np.ndarray  # [C, H, W], on the data's grid


def attack_images(
    smoothed: Smoothed,
    images: Images,
    predicted: Sequence[int],
    epsilons: Sequence[float],
    *,
    seed: int,
    alpha: float = 0.001,
    steps: int = STEPS,
    job: Job | None = None,
) -> list[Broken | None]:
    """PGD at growing budgets on every image, until the smoothed classifier's answer is not `predicted`.

    Attacked images are rounded to the data's grid, as a file of them would be, and their distance is measured after.

    Returns
    -------
    One entry an image: None where no attack changed the answer, or where the work was stopped before.
    """
    batch = images.batch()
    said = torch.as_tensor(np.asarray(predicted), dtype=torch.int64)
    noise = smoothed.sigma * _attack_noise(images, batch, seed)
    found: list[Broken | None] = [None] * len(images)
    for done, epsilon in enumerate(epsilons, start=1):
        left = [i for i, broken in enumerate(found) if broken is None]
        if not left or (job is not None and job.stopped):
            break
        attacked = PGD(epsilon, steps)(smoothed.base_classifier, batch[left], said[left], noise[:, left])
        attacked = _on_grid(attacked, images.grid)
        asked = from_arrays(attacked, grid=images.grid, name="attacked")
        answers = smoothed.predict(asked, n=ASKED, alpha=alpha, seed=seed)
        for i, point, answer in zip(left, attacked, answers, strict=True):
            if answer not in (ABSTAIN, predicted[i]):
                distance = float(norms((point - batch[i])[None].double())[0])
                found[i] = Broken(distance, int(answer), point.numpy())
        if job is not None:
            job.progress(done / len(epsilons), f"budget {epsilon:.2f}")
    return found


def _attack_noise(images: Images, batch: Tensor, seed: int) -> Tensor:
    """Standard normals [copies, N, C, H, W] that no vote uses."""
    draws = [
        standard_normal(batch[0].numel(), seed=seed, purpose=Purpose.ATTACK, image_id=i, start=0, stop=COPIES)
        for i in images.ids
    ]
    return torch.from_numpy(np.stack(draws, axis=1)).reshape(COPIES, *batch.shape)


def _on_grid(images: Tensor, grid: int | None) -> Tensor:
    return images if grid is None else (images * grid).round() / grid


def attack_table(certificates: pd.DataFrame, broken: Sequence[Broken | None]) -> pd.DataFrame:
    """Certificates beside attacks, one row an image: idx, label, predict, radius, distance, instead, crossing.

    `distance` is NaN where no attack succeeded; `crossing` says that one did below the radius.
    """
    distance = np.array([np.nan if b is None else b.distance for b in broken])
    instead = np.array([ABSTAIN if b is None else b.instead for b in broken])
    table = certificates[["idx", "label", "predict", "radius"]].reset_index(drop=True)
    return table.assign(distance=distance, instead=instead, crossing=distance < table["radius"].to_numpy())


def attack_figure(table: pd.DataFrame, *, sigma: float, reach: float, title: str) -> go.Figure:
    """Left: the share of answers that stand under attack, above the share that is certified. Right: image by image.

    `table` is as `attack_table` makes it; `reach` is the largest budget tried.
    """
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=("all images", "each image"))
    style = figures.sigma_style(sigma)
    line = {"color": style.colour, "width": 2.6}
    longest = float(table["radius"].max())
    top = 1.05 * max(reach, longest, 0.1)
    at = np.unique(np.concatenate([[0.0, reach], table["radius"], table["distance"].dropna()]))
    tried, shown = at[at <= reach], np.array([round_down(r) for r in at])
    fig.add_scatter(
        x=tried, y=[1 - (table["distance"] <= r).mean() for r in tried], text=shown[at <= reach], row=1, col=1,
        name="stands under attack", mode="lines", line={"color": DARK, "width": 2.2, "dash": "dash", "shape": "hv"},
        hovertemplate="no attack within %{text} changes %{y:.3f}<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=at, y=[(table["radius"] >= r).mean() for r in at], text=shown, name="certified", mode="lines", row=1, col=1,
        fill="tozeroy", line={**line, "shape": "vh"}, hovertemplate="radius ≥ %{text}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=[0, top], y=[0, top], name="the certified radius", mode="lines", hoverinfo="skip", row=1, col=2,
        line=line, showlegend=False,
    )  # fmt: skip
    for name, which, marker in _kinds(table, style.colour):
        part = table[which]
        fig.add_scatter(
            x=part["radius"], y=part["distance"].fillna(reach), name=name, mode="markers", marker=marker, row=1, col=2,
            text=[_said(*found) for found in part[["idx", "radius", "distance"]].itertuples(index=False)],
            hovertemplate="%{text}<extra>" + name + "</extra>",
        )  # fmt: skip
    figures.dress(fig, title, figures.RADIUS_AXIS)
    fig.update_xaxes(range=[0, top], col=1)
    fig.update_yaxes(title_text="share of images", range=[0, 1.04], col=1)
    right = 1.08 * max(longest, 0.1)
    fig.update_xaxes(title_text="certified radius", range=[0, right], col=2)
    fig.update_yaxes(title_text="L2 distance of the attack", range=[0, 1.06 * max(reach, right)], col=2)
    below = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.26, "yanchor": "top"}
    return fig.update_layout(height=510, legend=below, margin={"t": 92, "b": 50}, uirevision="attack")


def _said(idx: float, radius: float, distance: float) -> str:
    attack = "no attack found" if np.isnan(distance) else f"attack at {round_down(distance)}"
    return f"image {int(idx)}: radius {round_down(radius)}, {attack}"


def _kinds(table: pd.DataFrame, colour: str) -> list[tuple[str, pd.Series, dict]]:
    crossing, broken = table["crossing"], table["distance"].notna()
    open_triangle = {"symbol": "triangle-up-open", "size": 9, "color": colour, "line": {"width": 2, "color": colour}}
    return [
        ("attack succeeds here", broken & ~crossing, {"symbol": "circle", "size": 9, "color": DARK}),
        ("none succeeds", ~broken, open_triangle),
        ("CROSSING", crossing, {"symbol": "x", "size": 15, "color": CROSSING, "line": {"width": 2, "color": "#000000"}}),
    ]  # fmt: skip


def save_case(folder: str | Path, case: dict) -> Path:
    """Keep a crossing as one .npz file: image, attacked image, and all that was claimed and found."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"case-image-{case['idx']}.npz"
    np.savez(path, **case)
    return path


class AttackPanel(Panel):
    """PGD against the certificates of a record of fixed n.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : data.Images
        The whole split the record is of.
    record : Record
    cases_dir : path, optional
        Where crossings are kept; `cases` holds them in any case.
    alpha : float in (0, 1), failure probability of each certificate
    n : int, estimation samples, a block edge of the record; the most by default
    number : int, images that are attacked, spread over the split
    reach : float, the largest budget, an L2 distance in pixel units on [0, 1]
    seed : int, of the noise that attack and judgement draw

    alpha and n move the certificates from kept counts; the others ask for another attack, behind the button.
    """

    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int().tag(setting=True)
    number = traitlets.Int(24, min=1, max=10_000).tag(setting=True)
    reach = traitlets.Float(1.4, min=0.05, max=20.0).tag(setting=True)
    seed = traitlets.Int(0, min=0).tag(setting=True)

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        record: Record,
        *,
        cases_dir: str | Path | None = None,
        alpha: float = 0.001,
        n: int | None = None,
        number: int = 24,
        reach: float = 1.4,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.smoothed = Smoothed(base_classifier, record.sigma, noise=record.identity.noise)
        self.counts = read_counts(record)
        self.edges = self.counts.edges
        self.cases: list[dict] = []
        self.cases_dir = cases_dir
        self._attacked: tuple[tuple, list[Broken | None]] | None = None
        n = self.edges[-1] if n is None else n
        super().__init__(dict(alpha=alpha, n=n, number=number, reach=reach, seed=seed))

    def controls(self) -> Sequence[widgets.Widget]:
        number = widgets.BoundedIntText(min=1, max=len(self.images), description="images", style=LABEL)
        reach = widgets.FloatSlider(
            value=self.reach, min=0.05, max=max(3.0, self.reach), step=0.05, description="reach",
            continuous_update=False, style=LABEL, tooltip="the largest budget of the attack",
        )  # fmt: skip
        self.number_control, self.reach_slider = linked(self, "number", number), linked(self, "reach", reach)
        self.alpha_control, self.n_control = AlphaControl(self), EdgeControl(self)
        self.job = Job("Attack", self._attack, self.complain)
        return [row(self.alpha_control, self.n_control), row(self.number_control, self.reach_slider, self.job)]

    def _wanted(self) -> tuple:
        return (self.number, self.reach, self.seed)

    def _certificates(self) -> pd.DataFrame:
        """Of the images under attack, spread evenly over the split."""
        table = self.counts.certificates(alpha=self.alpha, n=self.n)
        picked = np.unique(np.linspace(0, len(table) - 1, min(self.number, len(table))).astype(int))
        return table.iloc[picked]

    def _attack(self, job: Job) -> None:
        with self.lock:
            wanted, chosen = self._wanted(), self._certificates()
            alpha, n = self.alpha, self.n
        place = {int(i): p for p, i in enumerate(self.images.index)}
        only = self.images.at(np.array([place[int(i)] for i in chosen["idx"]]), "attacked")
        # what the smoothed classifier most likely says, certified or not: the selected class
        picked = np.searchsorted(self.counts.index, chosen["idx"])
        said = self.counts.c_a[picked].tolist()
        budgets = np.linspace(wanted[1] / 8, wanted[1], 8)
        broken = attack_images(self.smoothed, only, said, budgets, seed=wanted[2], job=job)
        self._keep_crossings(attack_table(chosen, broken), broken, only, alpha=alpha, n=n)
        with self.lock:
            self._attacked = (wanted, broken)
        self.refresh()

    def _keep_crossings(self, table: pd.DataFrame, broken: list, images: Images, *, alpha: float, n: int) -> None:
        """Ask again, with more and fresh noise, before a crossing is believed."""
        for i in np.flatnonzero(table["crossing"]):
            asked = from_arrays(torch.from_numpy(broken[i].attacked)[None], grid=images.grid, name="attacked")
            (again,) = self.smoothed.predict(asked, n=ASKED_AGAIN, alpha=alpha, seed=fresh_seed())
            if again in (ABSTAIN, table["predict"][i]):
                broken[i] = None
                continue
            case = table.iloc[i].to_dict() | {
                "image": images[int(i)].numpy(), "attacked": broken[i].attacked, "sigma": self.smoothed.sigma,
                "alpha": alpha, "n": n, "dataset": images.dataset, "key": images.keys[i],
            }  # fmt: skip
            self.cases = [*self.cases, case]
            if self.cases_dir is not None:
                save_case(self.cases_dir, case)

    def table(self) -> pd.DataFrame | None:
        """Certificates of now beside the attacks, as `attack_table` has them; None before an attack."""
        if self._attacked is None or self._attacked[0] != self._wanted():
            return None
        return attack_table(self._certificates(), self._attacked[1])

    def draw(self) -> tuple[go.Figure, str]:
        table, sigma = self.table(), self.smoothed.sigma
        asked = table is not None
        if not asked:
            certificates = self._certificates()
            table = attack_table(certificates, [None] * len(certificates))
        title = f"PGD on {len(table)} images: sigma = {sigma:g}, alpha = {self.alpha:.3g}, n = {self.n:,}"
        fig = attack_figure(table, sigma=sigma, reach=self.reach if asked else 0.0, title=title)
        fig.layout.meta = {**self.chosen("alpha", "n", "number", "reach"), "sigma": sigma, "attacked": asked}
        if asked:
            return fig, note(self._sentence(table)) + self._red()
        fig.data = [trace for trace in fig.data if trace.name in ("certified", "the certified radius")]
        return fig, note("No attack yet: press <b>Attack</b>.")

    def _sentence(self, table: pd.DataFrame) -> str:
        broken = table[table["distance"].notna()]
        text = f"{len(broken)} of {len(table)} answers were changed within {self.reach:g}."
        if len(broken):
            closest = broken.loc[(broken["distance"] - broken["radius"]).idxmin()]
            text += (
                f" Nearest to its line came image {int(closest.idx)}: certified to {round_down(closest.radius)}, "
                f"changed at {round_down(closest.distance)}."
            )
        crossed = int(table["crossing"].sum())
        if not crossed:
            return text + " None crossed its certified radius."
        new = " At these alpha and n that is new: press Attack to ask again and keep it."
        return f"{text} <b>{crossed} crossed.</b>{new if crossed > len(self.cases) else ''}"

    def _red(self) -> str:
        captions = (
            f"image {c['idx']}: {round_down(c['distance'], 4)} < {round_down(c['radius'], 4)}" for c in self.cases
        )
        return "".join(
            thumbnail(case["attacked"], html.escape(caption), crossing=True)
            for case, caption in zip(self.cases, captions, strict=True)
        )
