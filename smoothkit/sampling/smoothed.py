"""The smoothed classifier as one object: predict and certify images."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
from torch import Tensor

from smoothkit.certify.bounds import check_reach, radius_cap
from smoothkit.certify.fixed import certify_votes, predict_votes
from smoothkit.certify.sequential import sequential_rule
from smoothkit.data import Images, from_arrays
from smoothkit.kernels.philox import Purpose, fresh_seed
from smoothkit.records.record import Record
from smoothkit.sampling.batches import Task
from smoothkit.sampling.run import certify_sequentially, collect_votes
from smoothkit.sampling.stream import VoteStream, noise_form
from smoothkit.types import Certificate, StoppingRule, Votes, check_sigma


class Smoothed:
    """The smoothed classifier g(x) = argmax_c P(f(x + noise) = c), noise ~ N(0, sigma^2 I).

    Parameters
    ----------
    base_classifier : callable
        f: images [B, C, H, W] on [0, 1] -> logits [B, num_classes]; see `smoothkit.models`.
    sigma : float
        Standard deviation of the noise, pixel units on [0, 1], at the image's own resolution.
    batch, device, precision, compile, model_id : as in `sampling.run.collect_votes`

    Examples
    --------
    >>> smoothed = Smoothed(models.load("starter:digits-vit-0.25"), sigma=0.25)
    >>> smoothed.certify(data.load("digits", subset="first:1"), n=1_000)[0].sentence()
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        sigma: float,
        *,
        batch: int | None = None,
        device: str | None = None,
        precision: str = "float32",
        compile: bool | None = None,
        model_id: str | None = None,
    ) -> None:
        check_sigma(sigma)
        self.base_classifier, self.sigma = base_classifier, sigma
        self._how = dict(batch=batch, device=device, precision=precision, compile=compile)
        self.model_id = model_id

    def sample(
        self,
        images: Images | Tensor,
        *,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        seed: int = 0,
        out: str | os.PathLike | None = None,
        grid: int | str | None = "data",
        progress: bool = True,
        executor: Executor | None = None,
    ) -> Record:
        """All votes that certifying `images` needs, as a record (kept in the folder `out`, or in memory).

        Refuses, before sampling, an n that cannot reach alpha. With an `executor` the work is done elsewhere, see
        `sampling.run.collect_votes`.
        """
        rule = StoppingRule(n0=n0, n=n, alpha=alpha)
        check_reach(n, alpha)
        return collect_votes(
            self.base_classifier,
            _as_images(images),
            sigma=self.sigma,
            stopping_rule=rule,
            seed=seed,
            out=out,
            grid=grid,
            model_id=self.model_id,
            **self._how,
            progress=progress,
            executor=executor,
        )

    def sample_sequentially(
        self, images: Images | Tensor, radii: Sequence[float], *, seed: int = 0, progress: bool = True, **settings
    ) -> Record:
        """Votes until each of `radii` is certified or given up for each image; often far fewer than a fixed n.

        Settings are those of `certify.sequential_rule` (n0, n_max, alpha, beta, kind, looks, skip_wrong)
        and `out`, `grid`. The record is read with `certify.certificates`.
        """
        return self._sample_by_rule(images, settings, seed=seed, progress=progress, radii=radii)

    def sample_to_radius(
        self, images: Images | Tensor, within: float, *, seed: int = 0, progress: bool = True, **settings
    ) -> Record:
        """Votes until sampling on would lengthen an image's certified radius by no more than `within`.

        The radius itself is the answer here, to within so much (pixel units, as sigma), where `sample_sequentially`
        answers for radii given beforehand. Settings are those of `certify.sequential_rule` (n0, n_max, alpha, beta,
        looks, skip_wrong) and `out`, `grid`. The record is read with `certify.certificates`.
        """
        return self._sample_by_rule(images, settings, seed=seed, progress=progress, within=within)

    def _sample_by_rule(self, images: Images | Tensor, settings: dict, *, seed: int, progress: bool, **aim) -> Record:
        where = {name: settings.pop(name) for name in ("out", "grid", "executor") if name in settings}
        return certify_sequentially(
            self.base_classifier,
            _as_images(images),
            sigma=self.sigma,
            rule=sequential_rule(**aim, **settings),
            seed=seed,
            model_id=self.model_id,
            **self._how,
            progress=progress,
            **where,
        )

    def certify(self, images: Images | Tensor, **settings) -> list[Certificate]:
        """One certificate an image, in order; settings as in `sample`."""
        images = _as_images(images)
        record = self.sample(images, **settings)
        names = self.class_names(images)
        votes = record.votes().set_index("image_id")
        return [
            certify_votes(
                Votes(votes.at[i, "counts_selection"], int(votes.at[i, "n0"])),
                Votes(votes.at[i, "counts_estimation"], int(votes.at[i, "n"])),
                sigma=self.sigma,
                alpha=record.stopping_rule.alpha,
                noise=record.identity.noise,
                class_names=names,
            )
            for i in images.ids
        ]

    def predict(
        self,
        images: Images | Tensor,
        *,
        n: int = 1_000,
        alpha: float = 0.001,
        seed: int | None = None,
        grid: int | str | None = "data",
    ) -> np.ndarray:
        """Classes of images (ABSTAIN = -1), each wrong with probability at most alpha.

        Every call draws fresh noise unless given a `seed`: an attacker must not foresee it.
        """
        check_reach(n, alpha, predict=True)
        images = _as_images(images)
        stream = VoteStream(
            self.base_classifier,
            images,
            sigma=self.sigma,
            seed=fresh_seed() if seed is None else seed,
            grid=noise_form(grid, images),
            **self._how,
        )
        tasks = [Task(i, Purpose.PREDICT, 0, n) for i in range(len(images))]
        answers = {task.image: predict_votes(Votes(counts, n), alpha=alpha) for task, counts, _ in stream.run(tasks)}
        return np.array([answers[i] for i in range(len(images))])

    def class_names(self, images: Images) -> tuple[str, ...]:
        return images.class_names or tuple(getattr(self.base_classifier, "class_names", ()))

    def radius_cap(self, n: int, alpha: float = 0.001) -> float:
        """The largest radius n samples can certify at this sigma."""
        return radius_cap(n, alpha, self.sigma)


def _as_images(images: Images | Tensor) -> Images:
    if isinstance(images, Images):
        return images
    return from_arrays(images[None] if isinstance(images, Tensor) and images.ndim == 3 else images)
