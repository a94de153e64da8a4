"""The plane through an image: where the base classifier says what, where the smoothed one does, and the circle between."""

import dataclasses
import html
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import traitlets
from torch import Tensor

from smoothbook import figures
from smoothbook.panels.base import (
    LABEL,
    AlphaControl,
    EdgeControl,
    Panel,
    image_number,
    linked,
    note,
    row,
    sigma_slider,
)
from smoothbook.panels.job import Job
from smoothbook.panels.plane import (
    BASE_SIDE,
    DIRECTIONS,
    EDGES,
    Plane,
    answers_inside,
    base_regions,
    centre_votes,
    decide,
    make_plane,
    sample_plane,
)
from smoothbook.panels.regions import slice_figure
from smoothkit.certify import certify_votes
from smoothkit.data import Images
from smoothkit.sampling.stream import noise_of
from smoothkit.types import Certificate, Votes

COARSE, FINE = 16, 64  # points a side for the smoothed classifier
KEPT = 12  # sampled planes remembered


@dataclasses.dataclass(frozen=True, eq=False)
class _Sampled:
    """What was asked of one plane, and counted on it so far."""

    plane: Plane
    base: np.ndarray
    selection: Votes
    estimation: list[Votes]
    counts: dict[int, np.ndarray]  # by points a side


class SlicePanel(Panel):
    """Decision regions in a plane through an image.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : data.Images
    image : int, counted within `images`
    direction : one of `plane.DIRECTIONS`
    sigma : float, noise level, pixel units on [0, 1]
    alpha : float in (0, 1), failure probability of the certificate, and of PREDICT at each point
    n : int, samples a point, one of `plane.EDGES`; those of the certificate are as many
    seed : int, of the noise and of the random directions

    alpha and n act on kept votes; image, direction, sigma and seed ask for others, which are remembered.
    """

    image = traitlets.Int(0).tag(setting=True)
    direction = traitlets.Enum(DIRECTIONS, DIRECTIONS[1]).tag(setting=True)
    sigma = traitlets.Float(0.25, min=0.02, max=2.0).tag(setting=True)
    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int(EDGES[-1]).tag(setting=True)
    seed = traitlets.Int(0, min=0).tag(setting=True)

    edges = EDGES

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        *,
        image: int = 0,
        direction: str = DIRECTIONS[1],
        sigma: float = 0.25,
        alpha: float = 0.001,
        n: int = EDGES[-1],
        seed: int = 0,
    ) -> None:
        self.base_classifier, self.images = base_classifier, images
        self._pool = images.batch(0, min(len(images), 2_000))
        self._pool_labels = np.asarray(images.labels)[: len(self._pool)]
        self._kept: dict[tuple, _Sampled] = {}
        self._side = COARSE
        super().__init__(dict(image=image, direction=direction, sigma=sigma, alpha=alpha, n=n, seed=seed))
        self.observe(self._ask, ["image", "direction", "sigma", "seed"])
        self.job.start()

    def controls(self) -> Sequence[widgets.Widget]:
        direction = widgets.Dropdown(options=DIRECTIONS, value=self.direction, description="direction", style=LABEL)
        self.image_number, self.direction_choice = image_number(self), linked(self, "direction", direction)
        self.sigma_slider, self.alpha_control = sigma_slider(self), AlphaControl(self)
        self.n_control = EdgeControl(self)
        self.job = Job(f"Refine to {FINE}x{FINE}", self._sample, self.complain, start_with=self._ask_fine)
        return [
            row(self.image_number, self.direction_choice, self.job),
            row(self.sigma_slider, self.alpha_control, self.n_control),
        ]

    def refine(self) -> None:
        """Ask for the finer grid, as the button does."""
        self._ask_fine()
        self.job.restart()

    def _ask_fine(self) -> None:
        self._side = FINE

    def _ask(self, _change: object) -> None:
        self._side = COARSE
        self.job.restart()

    def _key(self) -> tuple:
        return (self.image, self.direction, self.sigma, self.seed)

    def _sample(self, job: Job) -> None:
        with self.lock:
            key, side, kept = self._key(), self._side, self._kept.get(self._key())
            image, direction, sigma, seed = key
        if kept is None:
            how = dict(sigma=sigma, seed=seed)
            plane = make_plane(
                self.base_classifier, self.images, image, direction=direction, pool=self._pool,
                pool_labels=self._pool_labels, **how,
            )  # fmt: skip
            centre = centre_votes(self.base_classifier, self.images, image, **how)
            kept = _Sampled(plane, base_regions(self.base_classifier, plane, BASE_SIDE), *centre, {})
            self._keep(key, kept)
        have = kept.counts.get(side, ())
        if len(have) < len(EDGES) and not job.stopped:
            # what was stopped is counted again: the same votes, and the picture gets no coarser
            for counts in sample_plane(self.base_classifier, kept.plane, side, sigma=sigma, seed=seed, job=job):
                if len(counts) > len(have):
                    kept.counts[side] = counts
                    self.refresh()
        self.refresh()

    def _keep(self, key: tuple, sampled: _Sampled) -> None:
        with self.lock:
            self._kept[key] = sampled
            while len(self._kept) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        self.refresh()

    def draw(self) -> tuple[go.Figure, str]:
        about = f"Image {self.image} at sigma = {self.sigma:g}, alpha = {self.alpha:.3g}, n = {self.n}"
        kept = self._kept.get(self._key())
        if kept is None:
            fig = go.Figure()
            figures.dress(fig, about)
            fig.layout.meta = self._meta()
            return fig, note("Votes are on their way.")
        edge = EDGES.index(self.n)
        names = [self.images.class_name(c) for c in range(len(kept.selection.counts))]
        certificate = certify_votes(
            kept.selection, kept.estimation[edge], sigma=self.sigma, alpha=self.alpha, class_names=tuple(names),
            noise=str(noise_of(None, self.images, self.sigma)), values=kept.plane.origin.numel(),
        )  # fmt: skip
        smoothed = shares = None
        side, votes = max(kept.counts, default=0), 0
        if side:
            edge = min(edge, len(kept.counts[side]) - 1)  # while sampling goes on, the points have fewer than the image
            counts, votes = kept.counts[side][edge], EDGES[edge]
            smoothed = decide(counts, votes, self.alpha).reshape(side, side)
            shares = (counts.max(axis=1) / votes).reshape(side, side)
        fig = slice_figure(
            kept.plane, kept.base, smoothed, shares=shares, certificate=certificate, class_names=names, title=about
        )
        fig.layout.meta = self._meta(side=side, votes=votes, radius=certificate.radius)
        so_far = f" The points have {votes} votes each so far." if 0 < votes < self.n else ""
        return fig, note(self._sentence(kept, smoothed, certificate) + so_far)

    def _meta(self, *, side: int = 0, votes: int = 0, radius: float = 0.0) -> dict:
        """What the figure was made with: points a side and votes a point, both 0 while the first are awaited."""
        chosen = self.chosen("image", "direction", "sigma", "alpha", "n")
        return {**chosen, "side": side, "votes": votes, "radius": radius}

    def _sentence(self, kept: _Sampled, smoothed: np.ndarray | None, certificate: Certificate) -> str:
        said = html.escape(certificate.sentence())
        if smoothed is None or certificate.radius == 0:
            return said
        inside = answers_inside(kept.plane, smoothed, certificate)
        total = inside.agree + inside.no_answer + inside.otherwise
        if not total:
            return f"{said} The circle lies between the sampled points."
        return (
            f"{said} Of {total} sampled points inside the circle {inside.agree} answer so, {inside.no_answer} "
            f"give no answer and {inside.otherwise} answer otherwise."
        )
