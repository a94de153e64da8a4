"""The plane through an image: where the base classifier says what, where the smoothed one does, and the circle between.

Points of the plane may leave [0, 1], as noisy copies do anyway; the image in the middle is checked. Votes on the points
are made for looking (Purpose.PILOT, float noise); those on the image itself are a certificate's, selection and
estimation apart.
"""

import dataclasses
import html
import itertools
from collections.abc import Callable, Iterator, Sequence

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import torch
import traitlets
from plotly.subplots import make_subplots
from scipy import ndimage
from torch import Tensor

from smoothbook import figures
from smoothbook.panels.base import AlphaControl, EdgeControl, Job, Panel, choose_edge, linked, note, row
from smoothbook.training.attacks import PGD
from smoothkit import Purpose
from smoothkit.certify import certify_votes
from smoothkit.certify.bounds import predict_p_value
from smoothkit.data import UNLABELLED, Images, check_images
from smoothkit.kernels.noise import standard_normal
from smoothkit.kernels.philox import content_digest, image_id
from smoothkit.models import evaluating
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import ABSTAIN, Certificate, Votes

DIRECTIONS = ("random", "towards another image", "attack")
EDGES = (20, 50, 100)  # samples a point, kept in these blocks
COARSE, FINE, BASE_SIDE = 16, 64, 64  # points a side
ATTACK_STEPS, ATTACK_COPIES = 12, 16
KEPT = 12  # sampled planes remembered
SMOOTHED = "smoothed classifier; white: no answer"
# light enough for black labels on them; Paul Tol, "Colour Schemes", 2021: light
COLOURS = (
    "#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#DDAADD", "#C8B88A", "#AAAAAA",
)  # fmt: skip


# --- the plane ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """origin + u * first + v * second, for u and v from -half to half; the directions are orthonormal.

    `path` holds points (u, v) of an attack [k, 2], projected where it leaves the plane; `marks` other points by name.
    """

    origin: Tensor
    first: Tensor
    second: Tensor
    half: float
    names: tuple[str, str]
    path: np.ndarray
    marks: dict[str, tuple[float, float]]

    def axis(self, side: int) -> np.ndarray:
        """Coordinates of the points, the centres of `side` cells."""
        return self.half * (2 * (np.arange(side) + 0.5) / side - 1)

    def point(self, u: float, v: float) -> Tensor:
        return self.origin + u * self.first + v * self.second


class PlanePoints(Images):
    """Points of a plane through a checked image: unlike images at large they may leave [0, 1]."""

    def __getitem__(self, i: int) -> Tensor:
        point = self.read(int(self.index[i]))
        check_images(point[None], name=f"point {self.keys[i]}", check_range=False)
        return point


def plane_points(plane: Plane, side: int) -> PlanePoints:
    """The side * side points of a plane, rows from the bottom, each with noise of its own."""
    check_images(plane.origin[None], name="the image in the middle")
    axis = plane.axis(side)
    at = [(u, v) for v in axis for u in axis]
    known = "-".join(content_digest(x) for x in (plane.origin, plane.first, plane.second))
    return PlanePoints(
        dataset="slice", split="all", subset="all", index=np.arange(len(at)), keys=tuple(f"{u!r},{v!r}" for u, v in at),
        labels=np.full(len(at), UNLABELLED), class_names=(), grid=None, read=lambda i: plane.point(*at[i]),
        ids=tuple(image_id(f"slice:{known}:{u!r},{v!r}") for u, v in at),
    )  # fmt: skip


def make_plane(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    image: int,
    *,
    direction: str,
    sigma: float,
    seed: int,
    pool: Tensor,
    pool_labels: np.ndarray,
) -> Plane:
    """The plane through `images[image]` that `direction` names; `pool` [N, C, H, W] holds other images to go to.

    It reaches a little beyond the nearest image of another class. The attack is PGD on the soft smoothed classifier.
    """
    origin = images[image]
    apart = (pool - origin).flatten(1).norm(dim=1).numpy()
    others = np.flatnonzero(pool_labels != images.labels[image])
    if not len(others):
        raise ValueError("images must hold one of another class than the image; the plane's size is taken from it")
    nearest = int(others[apart[others].argmin()])
    half = 1.15 * float(apart[nearest])
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(origin.shape, generator=generator) for _ in range(2)]
    path, marks, names = np.zeros((0, 2)), {}, ("a random direction", "another random direction")
    wanted = random
    if direction == "towards another image":
        wanted = [pool[nearest] - origin, random[1]]
        named = images.class_name(int(pool_labels[nearest]))
        marks = {f"nearest other image, “{named}”": (float(apart[nearest]), 0.0)}
        names = ("towards the other image", "a random direction")
    elif direction == "attack":
        steps = attack_path(base_classifier, images, image, sigma=sigma, seed=seed, epsilon=half / 1.15)
        wanted = [steps[-1] - origin, steps[len(steps) // 3] - origin, random[1]]
        names = ("where the attack ends", "where it went on its way")
    first, second = orthonormal(wanted + random)
    if direction == "attack":
        path = torch.stack([((s - origin) * e).sum() for s in [origin, *steps] for e in (first, second)])
        path = path.reshape(-1, 2).numpy().astype(np.float64)
    return Plane(origin, first, second, half, names, path, marks)


def orthonormal(wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two orthonormal directions from the first of `wanted` that are independent (Gram-Schmidt)."""
    found: list[Tensor] = []
    for direction in wanted:
        rest = direction.double()
        for e in found:
            rest = rest - (rest * e).sum() * e
        if rest.norm() > 1e-3 * max(1e-9, float(direction.norm())):
            found.append(rest / rest.norm())
        if len(found) == 2:
            return found[0].float(), found[1].float()
    raise ValueError("the directions span no plane; choose another image or seed")


def attack_path(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    image: int,
    *,
    sigma: float,
    seed: int,
    epsilon: float,
    steps: int = ATTACK_STEPS,
) -> list[Tensor]:
    """Where PGD on the soft smoothed classifier is after each step; it works against what is said of the image."""
    x = images[image]
    draws = standard_normal(
        x.numel(), seed=seed, purpose=Purpose.ATTACK, image_id=images.ids[image], start=0, stop=ATTACK_COPIES
    )
    noise = sigma * torch.from_numpy(draws).reshape(ATTACK_COPIES, 1, *x.shape)
    with torch.inference_mode(), evaluating(base_classifier):
        said = base_classifier(x + noise[:, 0]).softmax(1).mean(0).argmax()[None]
    size = 2 * epsilon / steps
    attacks = (PGD(epsilon, steps=k, step_size=size) for k in range(1, steps + 1))
    return [attack(base_classifier, x[None], said.clone(), noise)[0] for attack in attacks]


# --- votes on it -------------------------------------------------------------------------------------


def base_regions(base_classifier: Callable[[Tensor], Tensor], plane: Plane, side: int = BASE_SIDE) -> np.ndarray:
    """What the base classifier says without noise: int64 [side, side], rows from the bottom."""
    axis = torch.from_numpy(plane.axis(side)).float()
    along, said = axis.reshape(-1, 1, 1, 1) * plane.first, []
    with torch.inference_mode(), evaluating(base_classifier):
        for v in axis:
            points = plane.origin + along + v * plane.second
            check_images(points, name="points of the plane", check_range=False)
            said.append(base_classifier(points).argmax(1).numpy())
    return np.stack(said)


def sample_plane(
    base_classifier: Callable[[Tensor], Tensor],
    plane: Plane,
    side: int,
    *,
    sigma: float,
    seed: int,
    edges: Sequence[int] = EDGES,
    job: Job | None = None,
) -> Iterator[np.ndarray]:
    """Votes of noisy copies of every point, cumulative at the edges: all points to the first edge, then to the next.

    Yields
    ------
    int64 [edges so far, side * side, classes] after each edge, until the job is stopped.
    """
    stream = VoteStream(base_classifier, plane_points(plane, side), sigma=sigma, seed=seed, grid=None, compile=False)
    counts = np.zeros((0, side * side, stream.num_classes), dtype=np.int64)
    for start, stop in itertools.pairwise((0, *edges)):
        block = np.zeros((1, *counts.shape[1:]), dtype=np.int64)
        tasks = [Task(i, Purpose.PILOT, start, stop) for i in range(side * side)]
        for done, (task, votes, _) in enumerate(stream.run(tasks), start=1):
            block[0, task.image] = votes
            if job is not None:
                if job.stopped:
                    return
                share = (start + (stop - start) * done / len(tasks)) / edges[-1]
                job.progress(share, f"{side}x{side} points, n = {stop}")
        counts = np.concatenate([counts, block + counts[-1:].sum(axis=0)])
        yield counts


def decide(counts: np.ndarray, alpha: float) -> np.ndarray:
    """PREDICT for many points: the class with most of the votes [points, classes], or ABSTAIN.

    A class is given where the two largest counts differ by a two-sided binomial test at alpha, as `predict_votes` does.
    """
    top = counts.argmax(axis=1)
    best = counts[np.arange(len(counts)), top]
    rest = counts.copy()
    rest[np.arange(len(counts)), top] = -1
    runner_up = np.maximum(rest.max(axis=1), 0)
    return np.where(predict_p_value(best, runner_up) <= alpha, top, ABSTAIN)


def centre_votes(
    base_classifier: Callable[[Tensor], Tensor], images: Images, image: int, *, sigma: float, seed: int
) -> tuple[Votes, list[Votes]]:
    """Votes on the image itself: 100 to select the class, and as many to estimate as each of EDGES says."""
    only = images.take(f"range:{image}:{image + 1}")
    stream = VoteStream(base_classifier, only, sigma=sigma, seed=seed, grid=images.grid, compile=False)
    blocks = [(Purpose.SELECT, 0, 100), *((Purpose.ESTIMATE, a, b) for a, b in zip((0, *EDGES), EDGES, strict=False))]
    selection, *parts = [Votes(c, t.stop - t.start) for t, c, _ in stream.run([Task(0, *block) for block in blocks])]
    estimation = [parts[0]]
    for part in parts[1:]:
        estimation.append(estimation[-1] + part)
    return selection, estimation


# --- the picture -------------------------------------------------------------------------------------


def slice_figure(
    plane: Plane,
    base: np.ndarray,
    smoothed: np.ndarray | None,
    *,
    shares: np.ndarray | None = None,
    certificate: Certificate | None,
    class_names: Sequence[str],
    title: str,
) -> go.Figure:
    """Decision regions of the base classifier on the left and of the smoothed one on the right, to one scale.

    Parameters
    ----------
    base, smoothed : int arrays [side, side], rows from the bottom, ABSTAIN where there is no answer; `smoothed` may
        have another side, or be None while votes are awaited
    shares : float array like `smoothed`, share of votes of the largest class
    certificate : of the image in the middle, whose circle is drawn
    """
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.07, subplot_titles=("base classifier, no noise", SMOOTHED))
    present = sorted({int(c) for grid in (base, smoothed) if grid is not None for c in np.unique(grid)} - {ABSTAIN})
    for col, grid, share in ((1, base, None), (2, smoothed, shares)):
        if grid is not None:
            fig.add_trace(_regions(plane, grid, share, present, class_names), row=1, col=col)
            fig.add_trace(_labels(plane, grid, class_names), row=1, col=col)
        for trace in _overlays(plane, certificate, legend=col == 1):
            fig.add_trace(trace, row=1, col=col)
    figures.dress(fig, title)
    for col in (1, 2):
        fig.update_xaxes(range=[-plane.half, plane.half], title_text=f"L2 distance, {plane.names[0]}", col=col)
        box = fig.get_subplot(1, col)
        box.yaxis.update(range=[-plane.half, plane.half], constrain="domain", zeroline=False, showgrid=False)
        box.yaxis.scaleanchor = box.xaxis.plotly_name.replace("axis", "")
        box.xaxis.update(constrain="domain", zeroline=False, showgrid=False)
    fig.update_yaxes(title_text=f"L2 distance, {plane.names[1]}", col=1)
    if smoothed is None:
        fig.add_annotation(text="votes are on their way", x=0, y=0.6 * plane.half, showarrow=False, row=1, col=2)
    below = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.16, "yanchor": "top"}
    fig.update_layout(height=590, legend=below, margin={"t": 92, "b": 40}, uirevision="slice")
    return fig


def _regions(plane, grid, shares, present: list[int], class_names: Sequence[str]) -> go.Heatmap:
    place = {c: i for i, c in enumerate(present)} | {ABSTAIN: -1}
    z = np.vectorize(place.__getitem__, otypes=[int])(grid)
    colours = ["#FFFFFF", *(COLOURS[c % len(COLOURS)] for c in present)]
    scale = [(k / len(colours), c) for i, c in enumerate(colours) for k in (i, i + 1)]
    said = np.vectorize(lambda c: "no answer" if c == ABSTAIN else f"“{class_names[c]}”", otypes=[object])(grid)
    if shares is not None:
        said = said + np.vectorize(lambda s: f", {s:.0%} of the votes", otypes=[object])(shares)
    axis = plane.axis(len(grid))
    return go.Heatmap(
        x=axis, y=axis, z=z, zmin=-1.5, zmax=len(present) - 0.5, colorscale=scale, showscale=False, zsmooth=False,
        text=said, hovertemplate="%{text}<br>at (%{x:.2f}, %{y:.2f})<extra></extra>", name="regions",
    )  # fmt: skip


def _labels(plane: Plane, grid: np.ndarray, class_names: Sequence[str]) -> go.Scatter:
    """The name of each class in the middle of its larger regions, so that colour is not needed to read them."""
    axis, where = plane.axis(len(grid)), []
    least = 0.008 * grid.size
    for c in set(np.unique(grid).tolist()) - {ABSTAIN}:
        pieces, number = ndimage.label(grid == c)
        for piece in range(1, number + 1):
            inside = pieces == piece
            if inside.sum() < max(least, 2):
                continue
            depth = ndimage.distance_transform_cdt(np.pad(inside, 1))[1:-1, 1:-1]
            i, j = np.unravel_index(depth.argmax(), depth.shape)
            where.append((axis[j], axis[i], str(class_names[c])))
    x, y, text = zip(*where, strict=True) if where else ((), (), ())
    return go.Scatter(
        x=x, y=y, text=text, mode="text", textfont={"size": 15, "color": "#000000"}, showlegend=False,
        hoverinfo="skip", name="labels",
    )  # fmt: skip


def _overlays(plane: Plane, certificate: Certificate | None, *, legend: bool) -> list[go.Scatter]:
    """The certified circle, the image, other images, and the attack's path, white below so that they show anywhere."""
    lines = []
    if certificate is not None and certificate.radius > 0:
        turn = np.linspace(0, 2 * np.pi, 181)
        x, y = certificate.radius * np.cos(turn), certificate.radius * np.sin(turn)
        lines.append(("certified circle", x, y, {"color": "#000000", "width": 3}))
    if len(plane.path):
        path = {"color": "#7A0177", "width": 2.5, "dash": "dot"}
        lines.append(("the attack’s path", plane.path[:, 0], plane.path[:, 1], path))
    found = []
    for name, x, y, line in lines:
        mode = "lines+markers" if "path" in name else "lines"
        white = {"color": "#FFFFFF", "width": line["width"] + 3}
        shared = {"x": x, "y": y, "hoverinfo": "skip", "legendgroup": name}
        found.append(go.Scatter(mode="lines", line=white, showlegend=False, name="", **shared))
        found.append(go.Scatter(mode=mode, line=line, marker={"size": 7}, name=name, showlegend=legend, **shared))
    marker = {"size": 9, "color": "#000000", "line": {"width": 1.5, "color": "#FFFFFF"}}
    marks = [("the image", (0.0, 0.0), "circle"), *((name, at, "square") for name, at in plane.marks.items())]
    for name, at, symbol in marks:
        found.append(
            go.Scatter(
                x=[at[0]], y=[at[1]], mode="markers", marker={**marker, "symbol": symbol}, name=html.escape(name),
                legendgroup=name, showlegend=legend, hovertemplate=html.escape(name) + "<extra></extra>",
            )
        )  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True)
class Inside:
    """How the sampled points within the certified circle answer: as the certificate says, not at all, otherwise."""

    agree: int
    no_answer: int
    otherwise: int


def answers_inside(plane: Plane, smoothed: np.ndarray, certificate: Certificate) -> Inside:
    """Count the points closer to the image than the radius."""
    axis = plane.axis(len(smoothed))
    near = smoothed[np.hypot(axis[None, :], axis[:, None]) < certificate.radius]
    agree, none = int((near == certificate.predicted).sum()), int((near == ABSTAIN).sum())
    return Inside(agree, none, len(near) - agree - none)


# --- the panel ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Sampled:
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
    image, direction, sigma, alpha, n, seed : the settings
        `direction` is one of DIRECTIONS. `n` counts samples a point, one of EDGES. alpha and n act on kept votes;
        image, direction, sigma and seed ask for others, which are remembered.
    """

    image = traitlets.Int(0).tag(setting=True)
    direction = traitlets.Enum(DIRECTIONS, DIRECTIONS[1]).tag(setting=True)
    sigma = traitlets.Float(0.25, min=0.02, max=2.0).tag(setting=True)
    alpha = traitlets.Float(0.001).tag(setting=True)
    n = traitlets.Int(EDGES[-1]).tag(setting=True)
    seed = traitlets.Int(0, min=0).tag(setting=True)

    def __init__(self, base_classifier: Callable[[Tensor], Tensor], images: Images, **settings) -> None:
        self.base_classifier, self.images = base_classifier, images
        self._pool = images.batch(0, min(len(images), 2_000))
        self._pool_labels = np.asarray(images.labels)[: len(self._pool)]
        self._kept: dict[tuple, _Sampled] = {}
        self._side = COARSE
        super().__init__(**settings)
        self.observe(self._ask, ["image", "direction", "sigma", "seed"])
        self.job.start()

    @traitlets.validate("image")
    def _valid_image(self, proposal: dict) -> int:
        if not 0 <= proposal["value"] < len(self.images):
            raise traitlets.TraitError(f"image must lie in 0..{len(self.images) - 1}, got {proposal['value']}")
        return proposal["value"]

    @traitlets.validate("n")
    def _valid_n(self, proposal: dict) -> int:
        return choose_edge(EDGES, proposal["value"])

    def controls(self) -> Sequence[widgets.Widget]:
        wide = {"description_width": "4.5em"}
        number = widgets.BoundedIntText(min=0, max=len(self.images) - 1, description="image", style=wide)
        direction = widgets.Dropdown(options=DIRECTIONS, value=self.direction, description="direction", style=wide)
        sigma = widgets.FloatSlider(
            value=self.sigma, min=0.02, max=2.0, step=0.01, description="sigma", continuous_update=False, style=wide
        )
        self.image_number, self.direction_choice = linked(self, "image", number), linked(self, "direction", direction)
        self.sigma_slider, self.alpha_control = linked(self, "sigma", sigma), AlphaControl(self)
        self.n_control = linked(self, "n", EdgeControl(EDGES, self.n))
        self.job = Job(f"Refine to {FINE}x{FINE}", self._sample, self.complain, start_with=self._ask_fine)
        return [
            row(self.image_number, self.direction_choice, self.job),
            row(self.sigma_slider, self.alpha_control, self.n_control),
        ]

    def settle(self) -> None:
        self.job.wait()

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
            noise="float" if self.images.grid is None else f"grid:{self.images.grid}",
        )  # fmt: skip
        smoothed = shares = None
        side, votes = max(kept.counts, default=0), 0
        if side:
            edge = min(edge, len(kept.counts[side]) - 1)  # while sampling goes on, the points have fewer than the image
            counts, votes = kept.counts[side][edge], EDGES[edge]
            smoothed = decide(counts, self.alpha).reshape(side, side)
            shares = (counts.max(axis=1) / votes).reshape(side, side)
        fig = slice_figure(
            kept.plane, kept.base, smoothed, shares=shares, certificate=certificate, class_names=names, title=about
        )
        fig.layout.meta = self._meta(side=side, votes=votes, radius=certificate.radius)
        so_far = f" The points have {votes} votes each so far." if 0 < votes < self.n else ""
        return fig, note(self._sentence(kept, smoothed, certificate) + so_far)

    def _meta(self, *, side: int = 0, votes: int = 0, radius: float = 0.0) -> dict:
        """What the figure was made with: points a side and votes a point, both 0 while the first are awaited."""
        chosen = {name: getattr(self, name) for name in ("image", "direction", "sigma", "alpha", "n")}
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
