"""One image: its noisy copies, votes that fill up while you watch, and the certificate they give.

Votes may be looked at, and sampling stopped, at any moment. The limits shown are therefore those of a confidence
sequence, which holds at all moments together; a bound made for one look at a fixed n would promise too much.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import traitlets
from plotly.subplots import make_subplots
from torch import Tensor

from smoothbook import figures
from smoothbook.panels.base import (
    LABEL,
    AlphaControl,
    Panel,
    image_number,
    linked,
    note,
    row,
    sigma_slider,
    thumbnail,
)
from smoothbook.panels.job import Job
from smoothkit import Purpose, noisy_copies
from smoothkit.certify.betting import kt_lower, kt_upper
from smoothkit.certify.fixed import from_lower_bound
from smoothkit.data import Images
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream, noise_of
from smoothkit.types import Certificate, Votes, round_down

COPIES = 7  # noisy copies shown
PIECE = 100  # samples between two pictures while sampling
CHOICES = 5  # thumbnails at each end; a row in all


def certificate_so_far(
    selection: Votes,
    estimation: Votes,
    *,
    sigma: float,
    alpha: float,
    noise: str,
    class_names: Sequence[str] = (),
    values: int | None = None,
) -> Certificate:
    """The certificate of votes that were looked at while they came, and could be stopped at any time.

    p_A is bounded by a confidence sequence (`betting.kt_lower`): the chance that it is *ever* too high is alpha.
    """
    n_a = int(estimation.counts[selection.top])
    p_a_lower = float(kt_lower(n_a, estimation.n, alpha)) if estimation.n else 0.0
    known = dict(sigma=sigma, alpha=alpha, noise=noise, class_names=class_names, values=values)
    return from_lower_bound(selection, estimation, p_a_lower, rule="kt", **known)


@dataclasses.dataclass(frozen=True)
class Distances:
    """L2 lengths beside which a radius is seen: a typical noise, and the nearest image of the same and another class."""

    noise: float
    same: float
    other: float


def distances_from(image: np.ndarray, label: int, others: np.ndarray, labels: np.ndarray, sigma: float) -> Distances:
    """From `image` [C, H, W] to `others` [N, C, H, W]; the image itself, at distance 0, is no neighbour."""
    apart = np.sqrt(((others - image) ** 2).reshape(len(others), -1).sum(axis=1))
    same, other = apart[(labels == label) & (apart > 0)], apart[labels != label]
    nearest = [float(x.min()) if len(x) else math.nan for x in (same, other)]
    return Distances(sigma * math.sqrt(image.size), *nearest)


def image_figure(
    image: np.ndarray,
    copies: np.ndarray,
    answers: Sequence[str],
    counts: Sequence[int],
    n: int,
    *,
    class_names: Sequence[str],
    certificate: Certificate,
    distances: Distances,
    title: str,
) -> go.Figure:
    """Image and noisy copies on top; votes with limits on the left below; the ball to scale on the right.

    Parameters
    ----------
    image, copies : arrays [C, H, W] and [m, C, H, W] on [0, 1]
    answers : what the base classifier says of each copy
    counts, n : votes of the n copies so far
    """
    columns = len(copies) + 1
    half, rest = columns // 2, columns - columns // 2
    below = [{"colspan": half}, *[None] * (half - 1), {"colspan": rest}, *[None] * (rest - 1)]
    fig = make_subplots(
        rows=2, cols=columns, row_heights=[0.26, 0.74], vertical_spacing=0.12, horizontal_spacing=0.008,
        specs=[[{} for _ in range(columns)], below],
    )  # fmt: skip
    figures.dress(fig, title)
    pictures = figures.display_pixels(np.concatenate([image[None], copies]))
    for col, (pixels, caption) in enumerate(zip(pictures, ["the image", *(f"“{a}”" for a in answers)], strict=True)):
        figures.add_picture(fig, pixels, caption, row=1, col=col + 1, size=13)
    fig.add_trace(go.Bar(name="votes"), row=2, col=1)
    fig.add_hline(y=0.5, line={"color": "#444444", "dash": "dot", "width": 1.5}, row=2, col=1)
    fig.update_xaxes(title_text="class", type="category", showgrid=False, row=2, col=1)
    fig.update_yaxes(range=[0, 1.02], dtick=0.25, row=2, col=1)
    _add_ball(fig, certificate, distances, col=half + 1)
    fig.update_layout(showlegend=False, height=560, uirevision="image", margin={"t": 84, "r": 16})
    move_votes(fig, counts, n, class_names=class_names, certificate=certificate)
    return fig


def move_votes(
    fig: go.Figure, counts: Sequence[int], n: int, *, class_names: Sequence[str], certificate: Certificate
) -> None:
    """Give an `image_figure` other votes; making it anew would take longer than the votes do."""
    counts = np.asarray(counts)
    limits = {}
    if n:
        low, high = (bound(counts, n, certificate.alpha) for bound in (kt_lower, kt_upper))
        limits = {c: (float(low[c]), float(high[c])) for c in range(len(counts))}
    bars = figures.votes_trace(counts, class_names, max(n, 1), limits=limits, sigma=certificate.sigma)
    (votes,), (ball,) = fig.select_traces({"name": "votes"}), fig.select_traces({"name": "certified ball"})
    votes.update(x=bars.x, y=bars.y, customdata=bars.customdata, marker=bars.marker, error_y=bars.error_y)
    votes.hovertemplate = bars.hovertemplate
    ball.update(figures.circle(certificate.radius))
    fig.get_subplot(2, 1).yaxis.title.text = f"share of {n:,} votes"
    fig.layout.meta = {"n": n, **{name: getattr(certificate, name) for name in ("alpha", "sigma", "radius")}}


def _add_ball(fig: go.Figure, certificate: Certificate, distances: Distances, *, col: int) -> None:
    """Seen from the image: the ball, and at their true distance a typical noise and the nearest images."""
    colour = figures.sigma_colour(certificate.sigma)
    fig.add_scatter(
        **figures.circle(certificate.radius), mode="lines", fill="toself", fillcolor=colour, opacity=0.45,
        line={"color": colour, "width": 2}, name="certified ball", hoverinfo="name", row=2, col=col,
    )  # fmt: skip
    marks = [  # at angles that keep the labels apart
        ("the image", 0.0, 0.0, "cross-thin", "bottom center"),
        ("typical noise", distances.noise, 0.0, "x-thin", "top center"),
        ("nearest of its class", distances.same, 0.62, "circle-open", "top center"),
        ("nearest of another class", distances.other, -0.62, "square", "bottom center"),
    ]
    for name, far, angle, symbol, side in marks:
        if math.isnan(far):
            continue
        at = (far * math.cos(angle), far * math.sin(angle))
        if far:
            fig.add_scatter(
                x=[0, at[0]], y=[0, at[1]], mode="lines", line={"color": "#9AA5B1", "width": 1, "dash": "dot"},
                hoverinfo="skip", name="", row=2, col=col,
            )  # fmt: skip
        fig.add_scatter(
            x=[at[0]], y=[at[1]], mode="markers+text", name=name, textposition=side,
            text=[f"{name}<br>{far:.2f}" if far else ""],
            marker={"symbol": symbol, "size": 11, "color": "#1F2933", "line": {"width": 2, "color": "#1F2933"}},
            hovertemplate=f"{name}: {far:.3f}<extra></extra>", textfont={"size": 12}, row=2, col=col,
        )  # fmt: skip
    farthest = max(d for d in (certificate.radius, *dataclasses.astuple(distances)) if not math.isnan(d))
    fig.update_xaxes(title_text=figures.RADIUS_AXIS, range=[-0.42 * farthest, 1.32 * farthest], row=2, col=col)
    tall = max(certificate.radius, 0.95 * farthest)  # room for the labels
    fig.update_yaxes(visible=False, range=[-tall, tall], row=2, col=col)
    figures.equal_scale(fig.get_subplot(2, col))


class ImagePanel(Panel):
    """Pick an image, sample votes, see what they certify.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : data.Images
    radii : DataFrame, optional
        A certificate table (idx, radius): the pictures offered are then its shortest and longest radii.
    image : int, counted within `images`
    sigma : float, noise level, pixel units on [0, 1]
    alpha : float in (0, 1), failure probability of the certificate
    n : int, estimation samples at which sampling ends unless it is stopped
    n0 : int, samples to select the class
    seed : int, of the noise
    """

    image = traitlets.Int(0).tag(setting=True)
    sigma = traitlets.Float(0.25, min=0.02, max=2.0).tag(setting=True)
    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int(2_000, min=PIECE, max=1_000_000).tag(setting=True)
    n0 = traitlets.Int(100, min=1).tag(setting=True)
    seed = traitlets.Int(0, min=0).tag(setting=True)

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        radii: pd.DataFrame | None = None,
        *,
        image: int = 0,
        sigma: float = 0.25,
        alpha: float = 0.001,
        n: int = 2_000,
        n0: int = 100,
        seed: int = 0,
    ) -> None:
        self.base_classifier, self.images = base_classifier, images
        self._others, self._labels = images.batch(0, min(len(images), 2_000)).numpy(), np.asarray(images.labels)[:2_000]
        self._offered = _offered(images, radii)
        self._fresh()
        super().__init__(dict(image=image, sigma=sigma, alpha=alpha, n=n, n0=n0, seed=seed))

    def controls(self) -> Sequence[widgets.Widget]:
        options = [(f"image {self.image}", self.image)]
        options += [(f"image {i}: {self._label(i)}{text}", i) for i, text in self._offered]
        self.picker = widgets.Dropdown(options=options, description="pick", style=LABEL)
        self.picker.observe(self._picked, "value")
        n = widgets.BoundedIntText(min=PIECE, max=1_000_000, step=PIECE, description="n", style=LABEL)
        self.number, self.n_number = image_number(self), linked(self, "n", n)
        self.number.layout.width = self.n_number.layout.width = "13em"
        self.sigma_slider, self.alpha_control = sigma_slider(self), AlphaControl(self)
        self.job = Job("Sample", self._sample, self.complain)
        gallery = widgets.HTML("".join(self._offer(i, text) for i, text in self._offered), layout={"overflow": "auto"})
        return [
            gallery,
            row(self.picker, self.number, self.n_number),
            row(self.sigma_slider, self.alpha_control, self.job),
        ]

    def _label(self, i: int) -> str:
        return self.images.class_name(int(self.images.labels[i]))

    def _offer(self, i: int, text: str) -> str:
        return thumbnail(self.images[i].numpy(), f"{i}<br>{html.escape(text.strip(', '))}", side=44)

    def _picked(self, change: dict) -> None:
        if change["new"] is not None:
            self.image = change["new"]

    @traitlets.observe("image", "sigma", "seed", "n0")
    def _fresh(self, _change: object = None) -> None:
        """Other votes than those at hand belong to another image, sigma or seed."""
        if self.job is not None:
            self.job.stop()
        self._votes: tuple[Votes, Votes] | None = None
        self._shown = self._drawn = None

    def draw(self) -> tuple[go.Figure, str]:
        image = self.images[self.image]
        if self._shown is None:
            self._shown = self._look(image)
        copies, answers, distances, classes = self._shown
        selection, estimation = self._votes or (Votes(np.zeros(classes, int), 0), Votes(np.zeros(classes, int), 0))
        names = [self.images.class_name(c) for c in range(classes)]
        certificate = certificate_so_far(
            selection, estimation, sigma=self.sigma, alpha=self.alpha, class_names=names, values=image.numel(),
            noise=str(noise_of(None, self.images, self.sigma)),
        )  # fmt: skip
        votes = dict(counts=estimation.counts, n=estimation.n, class_names=names, certificate=certificate)
        if self._drawn is None:
            shown = (image.numpy(), copies.numpy(), [names[a] for a in answers])
            self._drawn = image_figure(*shown, distances=distances, title="", **votes)
        else:
            move_votes(self._drawn, **votes)
        label = html.escape(self._label(self.image))
        about = f"Image {self.image}, a “{label}”, at sigma = {self.sigma:g}, alpha = {self.alpha:.3g}"
        self._drawn.layout.title.text = about
        return self._drawn, note(self._sentence(certificate))

    def _look(self, image: Tensor) -> tuple:
        """Copies for looking, what the base classifier says of them, and the distances around the image."""
        copies = noisy_copies(
            image, sigma=self.sigma, seed=self.seed, purpose=Purpose.PILOT, image_id=self.images.ids[self.image],
            start=0, stop=COPIES, grid=self.images.grid,
        )  # fmt: skip
        with torch.inference_mode():
            logits = self.base_classifier(copies)
        label = int(self.images.labels[self.image])
        distances = distances_from(image.numpy(), label, self._others, self._labels, self.sigma)
        return copies, logits.argmax(1).tolist(), distances, logits.shape[1]

    def _sentence(self, certificate: Certificate) -> str:
        if certificate.n == 0:
            return "No votes yet: press <b>Sample</b>, and stop when you have seen enough."
        said = html.escape(certificate.sentence())
        return f"{said} The bound holds at every moment of sampling, so it may be read and stopped at any time."

    def _sample(self, job: Job) -> None:
        """Votes in pieces, each added and drawn; another image or sigma meanwhile ends it."""
        with self.lock:
            image, sigma, n0, n, seed = self.image, self.sigma, self.n0, self.n, self.seed
            only = self.images.take(f"range:{image}:{image + 1}")
            self._votes = None
        stream = VoteStream(self.base_classifier, only, sigma=sigma, seed=seed, compile=False)
        selection = Votes(next(stream.run([Task(0, Purpose.SELECT, 0, n0)]))[1], n0)
        estimation = Votes(np.zeros_like(selection.counts), 0)
        for start in range(0, n, PIECE):
            if job.stopped:
                break
            stop = min(n, start + PIECE)
            counts = next(stream.run([Task(0, Purpose.ESTIMATE, start, stop)]))[1]
            estimation = estimation + Votes(counts, stop - start)
            job.progress(stop / n, f"{stop:,} of {n:,}")
            with self.lock:
                if (image, sigma, n0, seed) != (self.image, self.sigma, self.n0, self.seed):
                    return
                self._votes = (selection, estimation)
                job.now_and_then(self.refresh)
        self.refresh()


def _offered(images: Images, radii: pd.DataFrame | None) -> list[tuple[int, str]]:
    """Images to pick and what is said of them: the shortest and longest radii, or simply the first."""
    if radii is None:
        return [(i, "") for i in range(min(2 * CHOICES, len(images)))]
    place = {int(index): i for i, index in enumerate(images.index)}
    known = radii[radii["idx"].isin(place)].sort_values("radius", kind="stable")
    ends = known if len(known) <= 2 * CHOICES else known.iloc[[*range(CHOICES), *range(-CHOICES, 0)]]
    return [(place[int(r.idx)], f", radius {round_down(r.radius, 2)}") for r in ends.itertuples()]
