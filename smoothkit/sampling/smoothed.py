"""The smoothed classifier as one object: predict and certify images."""

import os
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
from torch import Tensor

from smoothkit.certify.bounds import check_reach, radius_cap
from smoothkit.certify.fixed import certify_votes, predict_counts
from smoothkit.data import Images, from_arrays
from smoothkit.kernels.philox import Purpose, fresh_seed
from smoothkit.records.record import Record
from smoothkit.sampling.batches import Task
from smoothkit.sampling.run import as_run, collect_votes
from smoothkit.sampling.stream import VoteStream, noise_of
from smoothkit.types import Certificate, NoiseForm, StoppingRule, Votes, check_sigma


class Smoothed:
    """The smoothed classifier g(x) = argmax_c P(f(x + noise) = c), noise ~ N(0, sigma^2 I).

    Parameters
    ----------
    base_classifier : callable
        f: images [B, C, H, W] on [0, 1] -> logits [B, num_classes]; see `smoothkit.models`.
    sigma : float
        Standard deviation of the noise, pixel units on [0, 1], at the image's own resolution.
    noise : str, optional
        "grid:255", "exact-grid:255" or "float"; part of what g is. If not given, it is that of the first images asked
        about: noise on their own grid where they have one, else float; `self.noise` says which, and stays.
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
        noise: str | NoiseForm | None = None,
        batch: int | None = None,
        device: str | None = None,
        precision: str = "float32",
        compile: bool | None = None,
        model_id: str | None = None,
    ) -> None:
        check_sigma(sigma)
        self.base_classifier, self.sigma = base_classifier, sigma
        self.noise: NoiseForm | None = None if noise is None else NoiseForm.parse(noise)
        self._how = dict(batch=batch, device=device, precision=precision, compile=compile)
        self.model_id = model_id

    def sample(
        self,
        images: Images | Tensor,
        *,
        n: int | None = None,
        n0: int | None = None,
        alpha: float | None = None,
        rule: StoppingRule | None = None,
        noise: str | NoiseForm | None = None,
        seed: int = 0,
        out: str | os.PathLike | None = None,
        progress: bool = True,
        executor: Executor | None = None,
    ) -> Record:
        """All votes that certifying `images` needs, as a record; read it with `certificates`.

        Parameters
        ----------
        images : Images, or float tensor [B, C, H, W] or [C, H, W] on [0, 1]
        n, n0, alpha : int, int, float
            A fixed number of samples: n (10,000) estimate p_A and n0 (100) select the class; the certificate may fail
            with probability alpha (0.001).
        rule : StoppingRule, instead of the three
            As `sequential_rule(radii=[0.25])`, which decides radii, or `sequential_rule(within=0.05)`, which finds the
            radius; often with far fewer samples.
        noise : str, optional
            "grid", "exact-grid", "grid:255", "exact-grid:255" or "float": another form than this smoothed classifier's
            own, for these votes; see `NoiseForm.parse`.
        seed : int
        out : path, optional
            The record's folder, where an interrupted run goes on; in memory without it.
        progress : bool
        executor : concurrent.futures.Executor, optional
            Does the work elsewhere; see `sampling.run.collect_votes`.

        Raises
        ------
        ValueError
            Before sampling, for an n that cannot reach alpha, or radii that n cannot certify.
        RecordError
            If `out` holds another run.
        """
        images = _as_images(images)
        return collect_votes(
            self.base_classifier,
            images,
            sigma=self.sigma,
            stopping_rule=_rule_of(rule, n, n0, alpha),
            noise=self._noise_of(noise, images),
            seed=seed,
            out=out,
            model_id=self.model_id,
            **self._how,
            progress=progress,
            executor=executor,
        )

    def certify(
        self,
        images: Images | Tensor,
        *,
        n: int = 10_000,
        n0: int = 100,
        alpha: float = 0.001,
        noise: str | NoiseForm | None = None,
        seed: int | None = None,
        out: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> list[Certificate]:
        """One certificate an image, in order (CERTIFY of Cohen et al. 2019); parameters as in `sample`.

        alpha is the chance of an error over the noise. So the noise is fresh at every call, unless a `seed` is given or a
        record is kept in `out` (whose seed is 0 then): a seed known beforehand is for images that were fixed before
        it, such as a test set, as whoever knows it can look for an image with a false certificate. The sentence says so.
        """
        images = _as_images(images)
        fixed = 0 if seed is None and out is not None else seed
        record = self.sample(
            images, n=n, n0=n0, alpha=alpha, noise=noise, out=out, progress=progress,
            seed=fresh_seed() if fixed is None else fixed,
        )  # fmt: skip
        made = record.provenance()[-1]
        known = dict(
            sigma=self.sigma, alpha=alpha, noise=record.identity.noise, class_names=self.class_names(images),
            values=images[0].numel(), seed=fixed, run=as_run(record.identity.precision, made),
        )  # fmt: skip
        votes = record.votes().set_index("image_id")
        return [
            certify_votes(
                Votes(votes.at[i, "counts_selection"], n0), Votes(votes.at[i, "counts_estimation"], n), **known
            )
            for i in images.ids
        ]

    def predict(
        self,
        images: Images | Tensor,
        *,
        n: int = 1_000,
        alpha: float = 0.001,
        noise: str | NoiseForm | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """Classes of images (ABSTAIN = -1), each wrong with probability at most alpha (PREDICT of Cohen et al. 2019).

        Every call draws fresh noise unless given a `seed`: an attacker must not foresee it.
        """
        check_reach(n, alpha, predict=True)
        images = _as_images(images)
        seed = fresh_seed() if seed is None else seed
        form = self._noise_of(noise, images)
        stream = VoteStream(self.base_classifier, images, sigma=self.sigma, seed=seed, noise=form, **self._how)
        tasks = [Task(i, Purpose.PREDICT, 0, n) for i in range(len(images))]
        counted = {task.image: counts for task, counts, _ in stream.run(tasks)}
        return predict_counts(np.stack([counted[i] for i in range(len(images))]), n, alpha=alpha)

    def _noise_of(self, noise: str | NoiseForm | None, images: Images) -> NoiseForm:
        """The form that is asked for; else this classifier's own, which the first images settle."""
        if noise is not None:
            return noise_of(noise, images, self.sigma)
        if self.noise is None:
            self.noise = noise_of(None, images, self.sigma)
        return self.noise

    def class_names(self, images: Images) -> tuple[str, ...]:
        return images.class_names or tuple(getattr(self.base_classifier, "class_names", ()))

    def radius_cap(self, n: int, alpha: float = 0.001) -> float:
        """The largest radius n samples can certify at this sigma."""
        return radius_cap(n, alpha, self.sigma)


def _rule_of(rule: StoppingRule | None, n: int | None, n0: int | None, alpha: float | None) -> StoppingRule:
    given = {name: value for name, value in (("n", n), ("n0", n0), ("alpha", alpha)) if value is not None}
    if rule is not None:
        if given:
            raise ValueError(
                f"rule has n0, n and alpha of its own; leave out {', '.join(given)} or give them to the rule"
            )
        return rule
    rule = StoppingRule(**{"n0": 100, "n": 10_000, "alpha": 0.001} | given)
    check_reach(rule.n, rule.alpha)
    return rule


def _as_images(images: Images | Tensor) -> Images:
    if isinstance(images, Images):
        return images
    return from_arrays(images[None] if isinstance(images, Tensor) and images.ndim == 3 else images)
