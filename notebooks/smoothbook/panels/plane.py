"""A plane through an image, and what base and smoothed classifier say on it.

Points of the plane may leave [0, 1], as noisy copies do anyway; the image in the middle is checked. Votes on the points
are made for looking (Purpose.PILOT, float noise); those on the image itself are a certificate's, selection and
estimation apart.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from smoothbook.panels.job import Job
from smoothbook.training.attacks import PGD
from smoothkit import Purpose
from smoothkit.certify.bounds import smallest_n_predict
from smoothkit.certify.fixed import predict_counts
from smoothkit.data import UNLABELLED, Images, check_images
from smoothkit.kernels.noise import standard_normal
from smoothkit.kernels.philox import content_digest, image_id
from smoothkit.models import evaluating
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import ABSTAIN, Certificate, Votes

DIRECTIONS = ("random", "towards another image", "attack")
EDGES = (20, 50, 100)  # samples a point, kept in these blocks
BASE_SIDE = 64  # points a side for the base classifier
ATTACK_STEPS, ATTACK_COPIES = 12, 16


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
    known = "-".join(content_digest(x, 56) for x in (plane.origin, plane.first, plane.second))
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
    stream = VoteStream(
        base_classifier, plane_points(plane, side), sigma=sigma, seed=seed, noise="float", compile=False
    )
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


def decide(counts: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """PREDICT at every point, from counts [points, classes] over n copies each; all abstain where n is too few for alpha."""
    if n < smallest_n_predict(alpha):
        return np.full(len(counts), ABSTAIN)
    return predict_counts(counts, n, alpha=alpha)


def centre_votes(
    base_classifier: Callable[[Tensor], Tensor], images: Images, image: int, *, sigma: float, seed: int
) -> tuple[Votes, list[Votes]]:
    """Votes on the image itself: 100 to select the class, and as many to estimate as each of EDGES says."""
    only = images.take(f"range:{image}:{image + 1}")
    stream = VoteStream(base_classifier, only, sigma=sigma, seed=seed, compile=False)
    blocks = [(Purpose.SELECT, 0, 100), *((Purpose.ESTIMATE, a, b) for a, b in itertools.pairwise((0, *EDGES)))]
    selection, *parts = [Votes(c, t.stop - t.start) for t, c, _ in stream.run([Task(0, *block) for block in blocks])]
    return selection, list(itertools.accumulate(parts))


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
