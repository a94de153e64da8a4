"""Fine-tuning a diffusion model through a frozen classifier and one denoising step: diffusion calibration.

The aim is a denoiser whose images the classifier recognises where the noise has left something to recognise, and on which it
is undecided where not. The published method names two added losses and no formulas; these fit all that is known of it:

    Brier             mean over noises of || p_i - e_y ||^2, with p_i the classifier's softmax on the i-th denoised image
    anti-consistency  mean over pairs i < j of <p_i, p_j>, where the mean of the p_i has another argmax than the label
    denoising         the loss of the diffusion model at timesteps of the whole schedule, so that it stays one

References
----------
Jeong and Shin, "Multi-scale Diffusion Denoised Smoothing", NeurIPS 2023. arXiv:2310.16779.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothbook.adapters.base import device_of
from smoothbook.denoise.chain import DenoisedClassifier
from smoothbook.denoise.diffusion import DiffusionDenoiser, schedule_sigmas
from smoothbook.denoise.trained import frozen
from smoothbook.training.fit import FitSettings, fit
from smoothbook.training.losses import Terms
from smoothbook.training.run import Fitted, Rows
from smoothbook.training.schedules import Grid
from smoothkit.data import Images


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The loss above, for a DenoisedClassifier whose denoiser is a DiffusionDenoiser; a loss for `training.fit`.

    Every image may have a sigma of its own; it is denoised at the timestep of that sigma. Weights of 0 leave a term out,
    so the four ablations are brier and anti on or off.
    """

    brier: float = 1.0
    anti: float = 0.1
    denoising: float = 1.0
    copies: int = 2

    def __post_init__(self) -> None:
        for name in ("brier", "anti", "denoising"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.copies < 2:
            raise ValueError(f"copies must be at least 2, to be compared with each other, got {self.copies}")

    def __call__(
        self, base_classifier: DenoisedClassifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        denoiser = base_classifier.denoiser
        copies = len(noise)
        clean = denoise_at(denoiser, (images + noise).flatten(0, 1), sigma.expand(len(images)).repeat(copies))
        logits = base_classifier.classifier(clean).reshape(copies, len(images), -1)
        loss = self.brier * brier_loss(logits, labels) + self.anti * anti_consistency(logits, labels)
        if self.denoising:
            loss = loss + self.denoising * denoising_loss(denoiser, images)
        return Terms(loss, logits)


def brier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over copies and images of || softmax - e_y ||^2; logits [m, B, K], labels [B]."""
    wanted = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return (logits.softmax(-1) - wanted).square().sum(-1).mean()


def anti_consistency(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of the agreement <p_i, p_j> of two copies, 0 where the mean prediction is right; logits [m, B, K]."""
    p = logits.softmax(-1)
    copies = len(p)
    together = (p.sum(0).square().sum(-1) - p.square().sum((0, -1))) / (copies * (copies - 1))  # mean over i != j
    wrong = p.mean(0).argmax(-1) != labels
    return (together * wrong).mean()


def denoising_loss(denoiser: DiffusionDenoiser, images: Tensor) -> Tensor:
    """The loss the diffusion model was trained by: mean squared error of its prediction at random timesteps.

    Draws come from torch's generator, which `fit` seeds for every step.
    """
    z, _ = denoiser.pad(2 * images - 1)
    t = torch.randint(len(denoiser.alphas_bar), (len(z),), device=z.device)
    alpha_bar = torch.from_numpy(denoiser.alphas_bar).to(z)[t].reshape(-1, 1, 1, 1)
    noise = torch.randn_like(z)
    keep, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    answer = denoiser.predict(keep * z + spread * noise, t)
    wanted = {"epsilon": noise, "sample": z, "v_prediction": keep * noise - spread * z}[denoiser.prediction]
    return F.mse_loss(answer, wanted)


def denoise_at(denoiser: DiffusionDenoiser, images: Tensor, sigma: Tensor) -> Tensor:
    """Clean images on [0, 1] from images [B, C, H, W] with noise of sigma [B], in one call of the model."""
    levels = torch.from_numpy(schedule_sigmas(denoiser.alphas_bar)).to(sigma)
    reach = levels[levels.isfinite()].max()
    if not bool(((sigma > 0) & (sigma <= reach)).all()):
        raise ValueError(
            f"the diffusion schedule reaches sigma {float(reach):.4g} at most, and 0 not at all; got {sigma.tolist()}"
        )
    t = torch.searchsorted(levels, sigma.contiguous())  # the first that is at least as noisy
    alpha_bar = torch.from_numpy(denoiser.alphas_bar).to(images)[t].reshape(-1, 1, 1, 1)
    x, window = denoiser.pad(alpha_bar.sqrt() * (2 * images - 1))
    return (denoiser.predict_clean(x, t, alpha_bar)[window] + 1) / 2


def calibrate(
    denoiser: DiffusionDenoiser,
    classifier: nn.Module,
    images: Images,
    settings: FitSettings | None = None,
    *,
    sigmas: tuple[float, ...],
    loss: Calibration | None = None,
    on_epoch: Callable[[Rows], None] | None = None,
) -> Fitted:
    """Fine-tune the diffusion model of a denoiser, in place, for one classifier and several noise levels.

    Parameters
    ----------
    denoiser : DiffusionDenoiser
        Its model is trained, and with it that of every `denoiser.at(sigma)`: copy it first to compare. Of a model with
        parameters that have `requires_grad`, as one with LoRA put in by peft, only these are trained, otherwise all.
    classifier : nn.Module
        A frozen copy is used, with gradients to its input.
    images : Images
        Labelled training images.
    sigmas : floats, pixel units
        Scales of the cascade; each batch has equally many images of each.
    settings : FitSettings, optional
        Its loss and schedule are replaced; `FitSettings(lr=5e-5, validation=None)` if not given: `fit` validates at one
        timestep for all sigmas.
    loss : Calibration, optional
    on_epoch
        As in `training.fit`.

    Returns
    -------
    Fitted, whose `model` is the denoiser
    """
    if not isinstance(denoiser, DiffusionDenoiser):
        raise ValueError(f"denoiser must be a DiffusionDenoiser, got {type(denoiser).__name__}")
    before = [(p, p.requires_grad) for p in denoiser.unet.parameters()]
    # a hard clamp passes no gradient from pixels that overshoot, which at first are those that matter
    soft = denoiser.at(denoiser.sigma, clamp="straight-through").to(device_of(denoiser))
    if not any(wanted for _, wanted in before):
        soft.unet.requires_grad_(True)
    model = DenoisedClassifier(soft, frozen(classifier, device_of(denoiser)))
    settings = dataclasses.replace(
        settings or FitSettings(lr=5e-5, validation=None), loss=loss or Calibration(), schedule=Grid(tuple(sigmas))
    )
    try:
        done = fit(model, images, settings, on_epoch=on_epoch)
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
    return dataclasses.replace(done, model=denoiser.eval())
