"""Denoisers trained for one noise level, in front of a classifier that stays as it is: denoised smoothing.

Objectives, for a frozen classifier F, a denoiser D and noise g (Salman et al. 2020):

    mse             mean squared error of D(x + g) against x; needs no classifier
    stability       cross-entropy of F(D(x + g)) against argmax F(x); needs gradients through F, and no labels
    classification  cross-entropy of F(D(x + g)) against the label

`stability-after-mse` trains by mse first and by stability from there. Where F itself gives no gradients (query access),
other classifiers, the surrogates, stand in for it.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smoothbook.adapters.base import device_of, seeded
from smoothbook.denoise.chain import DenoisedClassifier, Denoiser
from smoothbook.settings import read_settings
from smoothbook.training.fit import FitSettings, fit
from smoothbook.training.losses import Terms
from smoothbook.training.run import Fitted, Rows
from smoothkit.data import Images
from smoothkit.models.load import read_tensors
from smoothkit.records import read_json
from smoothkit.types import check_sigma

OBJECTIVES = ("mse", "stability", "classification")
AFTER = "stability-after-mse"
CONFIG, WEIGHTS = "denoiser.json", "denoiser.safetensors"


class DnCNN(Denoiser):
    """The residual denoising network of Zhang et al. 2017, as denoised smoothing uses it: D(x) = x - net(x).

    3x3 convolutions with BatchNorm, orthogonal initial weights, the last ones zero: training starts at the identity. In
    train mode BatchNorm mixes the images of a batch, so votes are taken in eval mode only (the engine sees to it).

    Parameters
    ----------
    channels : int
        Of the images.
    sigma : float
        The noise it is trained for, pixel units on [0, 1].
    depth, width : int
        Convolutions and their channels; 17 and 64 in the papers.
    seed : int
        Of the initial weights.

    References
    ----------
    Zhang, Zuo, Chen, Meng and Zhang, "Beyond a Gaussian Denoiser", IEEE Transactions on Image Processing, 2017.
    """

    def __init__(
        self, channels: int, *, sigma: float, depth: int = 17, width: int = 64, seed: int = 0, name: str = "dncnn"
    ) -> None:
        check_sigma(sigma)
        if depth < 2 or width < 1 or channels < 1:
            raise ValueError(
                f"depth must be at least 2, width and channels at least 1, got {depth}, {width} and {channels}"
            )
        super().__init__(sigma=float(sigma), name=f"{name}@{sigma:g}")
        self.settings = dict(channels=channels, sigma=float(sigma), depth=depth, width=width, name=name)
        with seeded(seed):
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            for _ in range(depth - 2):
                # the weight 0.95 is torch's, of the latest batch: as in the released code
                norm = nn.BatchNorm2d(width, eps=1e-4, momentum=0.95)
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), norm, nn.ReLU()]
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.orthogonal_(layer.weight)
            layers.append(nn.Conv2d(width, channels, 3, padding=1, bias=False))
        nn.init.zeros_(layers[-1].weight)
        self.net = nn.Sequential(*layers)

    def estimate(self, rows: Tensor) -> Tensor:
        return rows - self.net(rows)

    def save(self, folder: str | Path) -> Path:
        """Write the denoiser: `denoiser.safetensors` and `denoiser.json`; read by `load_denoiser`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        (folder / CONFIG).write_text(json.dumps({"kind": "dncnn", "settings": self.settings}, indent=2) + "\n")
        return folder


def load_denoiser(folder: str | Path) -> DnCNN:
    """A trained denoiser from the folder its `save` wrote, in eval mode."""
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no trained denoiser: it lacks {' and '.join(missing)}")
    config = read_json(folder / CONFIG, ValueError, kind=str, settings=dict)
    if config["kind"] != "dncnn":
        raise ValueError(f"{folder / CONFIG} is of the kind {config['kind']!r}; known is 'dncnn'")
    denoiser = read_settings(DnCNN, config["settings"], where=f"{folder / CONFIG}: settings")
    try:
        denoiser.load_state_dict(read_tensors(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG} ({str(error).splitlines()[0]})") from None
    return denoiser.eval()


@dataclasses.dataclass(frozen=True)
class Denoising:
    """The loss of a denoiser inside a DenoisedClassifier, one of the objectives above; a loss for `training.fit`.

    Parameters
    ----------
    objective : `mse`, `stability` or `classification`
    surrogates : tuple of nn.Module
        Frozen classifiers used in place of the model's own, one drawn at random for each batch (the paper takes them
        in turn). It is drawn from torch's generator, which `fit` seeds for every step.
    """

    objective: str = "mse"
    surrogates: tuple[nn.Module, ...] = ()
    copies: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "surrogates", tuple(self.surrogates))
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1, got {self.copies}")

    def __call__(
        self, base_classifier: DenoisedClassifier, images: Tensor, labels: Tensor | None, *, noise, sigma, epoch=None
    ) -> Terms:
        classifier = base_classifier.classifier
        if self.surrogates and self.objective != "mse":
            classifier = self.surrogates[int(torch.randint(len(self.surrogates), ()))]
        denoised = base_classifier.denoiser((images + noise).flatten(0, 1))  # [copies * B, C, H, W]
        if self.objective == "mse":
            with torch.no_grad():  # for the accuracy only
                logits = classifier(denoised)
            loss = F.mse_loss(denoised, images.repeat(len(noise), 1, 1, 1))
        else:
            if self.objective == "stability":
                with torch.no_grad():
                    labels = classifier(images).argmax(1)
            logits = classifier(denoised)
            loss = F.cross_entropy(logits, labels.repeat(len(noise)))
        return Terms(loss, logits.reshape(len(noise), len(images), -1))


def fit_denoiser(
    denoiser: Denoiser,
    images: Images,
    settings: FitSettings | None = None,
    *,
    objective: str = "mse",
    classifier: nn.Module | None = None,
    surrogates: Sequence[nn.Module] = (),
    copies: int = 1,
    mse: dict | None = None,
    on_epoch: Callable[[Rows], None] | None = None,
) -> Fitted:
    """Train a denoiser in place, at its own noise level, in front of a classifier that is not trained.

    Parameters
    ----------
    denoiser : Denoiser, with a sigma, whose parameters have `requires_grad`
    images : Images
        Training images. Labels are used by `classification` alone; images without labels do for the others.
    settings : FitSettings, optional
        All but the loss and the schedule. With `out`, the two parts of `stability-after-mse` keep their checkpoints in
        `out/mse` and `out/stability`.
    objective : `mse`, `stability`, `classification` or `stability-after-mse`
    classifier : nn.Module, optional
        The classifier to be defended. A frozen copy is used: for the loss, unless there are surrogates, and for the
        accuracy in the rows. `mse` does without.
    surrogates : classifiers
        Stand-ins for a classifier without gradients; then `classifier` is only asked for labels, for the rows.
    copies : int
        Noisy copies of each image in a batch.
    mse : dict, optional
        For `stability-after-mse`: settings of the first training where they differ, as dict(epochs=50, lr=1e-3).
    on_epoch
        As in `training.fit`.

    Returns
    -------
    Fitted
        `model` is the denoiser. Rows of accuracy are left out where there is no classifier, or no label, to tell.

    Raises
    ------
    ValueError
        For an objective without what it needs, and as `training.fit`.
    """
    if denoiser.sigma is None:
        raise ValueError(f"{denoiser.name} has no sigma to be trained for")
    if objective not in (*OBJECTIVES, AFTER):
        raise ValueError(f"objective must be one of {', '.join((*OBJECTIVES, AFTER))}, got {objective!r}")
    settings, plain = settings or FitSettings(), FitSettings()
    for given in ("loss", "schedule"):
        if getattr(settings, given) != getattr(plain, given):
            raise ValueError(f"{given} is set by the objective and the denoiser's sigma; leave it out")
    if objective != "mse" and classifier is None and not surrogates:
        raise ValueError(f"the objective {objective!r} needs classifier= or surrogates=")
    if mse is not None and objective != AFTER:
        raise ValueError(f"mse= goes with the objective {AFTER!r}, got {objective!r}")
    unlabelled = bool((images.labels < 0).any())
    if unlabelled and objective == "classification":
        raise ValueError("the objective 'classification' needs labels; without them take mse or stability")
    shared = dict(classifier=classifier, surrogates=surrogates, copies=copies, on_epoch=on_epoch)
    if objective == AFTER:
        return _stability_after_mse(denoiser, images, settings, mse or {}, shared)
    if unlabelled:  # `fit` wants labels, these losses do not look at them
        images = dataclasses.replace(images, labels=images.labels * 0)
    device = device_of(denoiser)
    stand_in = surrogates[0] if surrogates else _NoAnswer(int(images.labels.max()) + 1)
    told = stand_in if classifier is None else classifier
    model = DenoisedClassifier(denoiser, frozen(told, device), name=denoiser.name)
    loss = Denoising(objective, tuple(frozen(s, device) for s in surrogates), copies)
    done = fit(model, images, dataclasses.replace(settings, loss=loss, schedule=denoiser.sigma), on_epoch=on_epoch)
    tells = not (unlabelled or isinstance(told, _NoAnswer))
    rows = done.rows if tells else [{k: v for k, v in row.items() if k in _WITHOUT_LABELS} for row in done.rows]
    return dataclasses.replace(done, model=denoiser.eval(), rows=rows)


_WITHOUT_LABELS = ("epoch", "step", "lr", "sigma", "loss", "seconds")


def _stability_after_mse(denoiser: Denoiser, images: Images, settings: FitSettings, mse: dict, shared: dict) -> Fitted:
    parts = {"mse": dataclasses.replace(settings, **mse), "stability": settings}
    done = []
    for objective, part in parts.items():
        if settings.out is not None:
            part = dataclasses.replace(part, out=Path(settings.out) / objective)
        done.append(fit_denoiser(denoiser, images, part, objective=objective, **shared))
        if done[0].interrupted:
            return done[0]
    first, then = done
    rows = [{"objective": o, **row} for o, part in zip(parts, done, strict=True) for row in part.rows]
    return dataclasses.replace(then, rows=rows, steps=first.steps + then.steps, seconds=first.seconds + then.seconds)


class _NoAnswer(nn.Module):
    """Stands where `fit` wants a classifier and none is needed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), self.num_classes)


def frozen(classifier: nn.Module, device: torch.device) -> nn.Module:
    """A copy in eval mode that passes gradients and is not trained."""
    return copy.deepcopy(classifier).requires_grad_(False).eval().to(device)
