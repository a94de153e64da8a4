"""Certifying adapters (CAF): a trained network beside a frozen feature extractor, and ensembles over sigma.

    z   = f(x)      the frozen base without its head       [B, d]
    z_a = a(x)      the certifying adapter, trained        [B, d]
    F(x) = W (z + z_a) + b                                 W, b trained

Both read the same noisy image in pixel units, and each normalises it for itself; the released code adds the noise
after a normalisation and so reports radii about five times too large. The adapter's last layer starts at zero and
the head as the base's, so that the start is the base itself.

Deng et al., "Certifying Adapters", 2024. arXiv:2405.16036. The text of the paper was not at hand: the structure is
that of its released code; how the members of an ensemble are combined is ours (designs A to D below).
"""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothbook.adapters.base import (
    CONFIG,
    Adapted,
    check_plain,
    frozen_copy,
    head_name,
    load,
    loads,
    preprocessing_of,
    remake,
    replace_module,
    seeded,
)
from smoothbook.settings import check_keywords, check_type
from smoothkit.models import BaseClassifier
from smoothkit.types import check_sigma

KIND, ENSEMBLE_KIND, PER_SIGMA_KIND = "certifying", "certifying-ensemble", "certifying-per-sigma"
DESIGNS = ("logits", "features", "noise")


class Features(nn.Module):
    """A base classifier without its head: images on [0, 1] -> features [B, dim]. Frozen.

    No graph is kept unless the images themselves want a gradient, as in an attack.
    """

    def __init__(self, base: BaseClassifier) -> None:
        super().__init__()
        self.classifier = frozen_copy(base).eval()
        name = head_name(self.classifier.network)
        self.dim = self.classifier.network.get_submodule(name).in_features
        replace_module(self.classifier.network, name, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            features = self.classifier(images)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(
                f"{self.classifier.name} without its head gives {tuple(features.shape)} and not [batch, {self.dim}]"
            )
        return features


# --- the adapter's network -------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the input added (He et al. 2016, the basic block)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        if stride == 1 and channels == out:
            self.short = nn.Identity()
        else:
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


def resnet(channels: int, features: int, *, width: int = 64, depth: int = 2, stages: int = 4) -> nn.Sequential:
    """A ResNet for small images (3x3 stem, no pooling before the end): images -> [B, features].

    `width` channels in the first stage, doubled in each of the `stages`; `depth` blocks a stage. The defaults are
    ResNet-18, the adapter of the released code. The last layer starts at zero.
    """
    if min(width, depth, stages) < 1:
        raise ValueError(f"width, depth and stages must be at least 1, got {width}, {depth} and {stages}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(stages):
        for block in range(depth):
            layers.append(ResidualBlock(before, width * 2**stage, stride=2 if stage and not block else 1))
            before = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _zero_linear(before, features))


def vit(
    channels: int,
    features: int,
    *,
    image_size: int | tuple[int, int],
    patch_size: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
) -> nn.Module:
    """A small timm vision transformer: images of one size -> [B, features]; the last layer starts at zero."""
    from timm.models.vision_transformer import VisionTransformer

    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if min(*sides, patch_size, width, depth, heads) < 1 or len(sides) != 2:
        raise ValueError(
            f"image_size, patch_size, width, depth and heads must be at least 1, got {image_size}, {patch_size}, {width}, "
            f"{depth} and {heads}"
        )
    if width % heads or min(sides) < patch_size:
        raise ValueError(
            f"width must be divisible by heads and the image hold a patch, got {width}, {heads}, {patch_size}"
        )
    network = VisionTransformer(
        img_size=image_size, patch_size=patch_size, in_chans=channels, num_classes=features,
        embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=2.0,
    )  # fmt: skip
    network.head = _zero_linear(width, features)
    return network


BUILDERS = {"resnet": resnet, "vit": vit}


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# --- one adapter -----------------------------------------------------------------------------------


class CertifyingNetwork(nn.Module):
    """head(f(x) + a(x)); without the adapter "head only", without the extractor "adapter alone"."""

    def __init__(self, extractor: Features | None, adapter: BaseClassifier | None, head: nn.Linear) -> None:
        super().__init__()
        self.extractor, self.adapter, self.head = extractor, adapter, head

    def parts(self, images: Tensor) -> list[Tensor]:
        return [part(images) for part in (self.extractor, self.adapter) if part is not None]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(sum(self.parts(images)))


class CertifyingClassifier(Adapted):
    """A frozen extractor with a certifying adapter."""

    @torch.no_grad()
    def feature_norms(self, images: Tensor) -> tuple[float, float]:
        """Mean L2 norms of f(x) and a(x) on (noisy) images: where the first is far larger, it drowns the second.

        Both as in eval mode; BatchNorm statistics do not move, so that a training may be watched with it.
        """
        network, training = self.network, self.training
        if network.extractor is None or network.adapter is None:
            raise ValueError("feature_norms compares extractor and adapter; this model has only one of them")
        self.eval()
        try:
            return tuple(float(z.norm(dim=1).mean()) for z in network.parts(images))
        finally:
            self.train(training)


def certifying(
    base: BaseClassifier,
    *,
    adapter: str | nn.Module = "resnet",
    adapter_settings: dict | None = None,
    channels: int | None = None,
    use_features: bool = True,
    use_adapter: bool = True,
    head: str = "base",
    num_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> CertifyingClassifier:
    """A certifying adapter beside a frozen copy of a base classifier.

    Parameters
    ----------
    base : BaseClassifier
        Convolutional or transformer; any with a linear head.
    adapter : `resnet`, `vit` or nn.Module
        Works at the image's own resolution, normalised as the base's input. A module must map images
        [B, C, H, W] to [B, d]; zero its last layer to start at the base.
    adapter_settings : dict
        Keyword arguments of the builder, as `{"width": 16, "depth": 1, "stages": 3}`.
    channels : int, optional
        Of the images; the base's if not given.
    use_features, use_adapter : bool
        False for the rows "adapter alone" and "head only" that every table of CAF needs.
    head : `base` or `new`
        Start from the base's head, or at random. Trained in either case.
    num_classes, class_names : optional
        Of a new head.
    seed : int

    Raises
    ------
    ValueError
        For settings that leave nothing, an unknown adapter, or a base without a linear head.
    """
    if not (use_features or use_adapter):
        raise ValueError("use_features and use_adapter are both False: nothing would be left")
    if head not in {"base", "new"}:
        raise ValueError(f"head must be base or new, got {head!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if num_classes is not None and head == "base":
        raise ValueError("num_classes= needs head='new'; the base's head has its own classes")
    check_plain(base)
    old_head = base.network.get_submodule(head_name(base.network))
    dim, settings = old_head.in_features, dict(adapter_settings or {})
    with seeded(seed):
        extractor = Features(base) if use_features else None
        own_adapter = _build(base, adapter, settings, channels, dim) if use_adapter else None
        new_head = nn.Linear(dim, num_classes or old_head.out_features)
    if head == "base":
        new_head = copy.deepcopy(old_head).requires_grad_(True)
    recorded = dict(
        adapter=adapter if isinstance(adapter, str) else None, adapter_settings=settings, channels=channels,
        use_features=use_features, use_adapter=use_adapter, head=head, num_classes=num_classes,
    )  # fmt: skip
    return CertifyingClassifier(
        CertifyingNetwork(extractor, own_adapter, new_head), base, kind=KIND, settings=recorded,
        own=("network.adapter.", "network.head."), class_names=class_names, raw=True,
    )  # fmt: skip


def _build(
    base: BaseClassifier, adapter: str | nn.Module, settings: dict, channels: int | None, dim: int
) -> BaseClassifier:
    channels = base.channels if channels is None else channels
    if channels is not None and channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if isinstance(adapter, nn.Module):
        network, name = adapter, type(adapter).__name__
    elif adapter not in BUILDERS:
        raise ValueError(f"adapter must be one of {', '.join(BUILDERS)} or a module, got {adapter!r}")
    elif channels is None:
        raise ValueError(f"{base.name} does not say how many channels images have; give channels=")
    else:
        check_keywords("adapter_settings", BUILDERS[adapter], settings, leave_out=("channels", "features"))
        network, name = BUILDERS[adapter](channels, dim, **settings), adapter
    return BaseClassifier(network, **{**preprocessing_of(base), "size": None, "channels": channels}, name=name)


@loads(KIND)
def _load(config: dict, base: BaseClassifier, folder: Path, given: dict) -> CertifyingClassifier:
    adapter = _adapter_of(config["settings"], given["adapter"], folder)
    return remake(certifying, config, base, folder, adapter=adapter).load_weights(folder)


def _adapter_of(settings: dict, adapter: nn.Module | None, folder: Path) -> str | nn.Module:
    """The adapter by its builder's name, or the user's own, which no folder holds."""
    if settings.get("adapter") is not None or not settings.get("use_adapter", True):
        return settings.get("adapter") or "resnet"
    if adapter is None:
        raise ValueError(f"the adapter in {folder} is a module of the user's own; hand in the same one as adapter=")
    return adapter


# --- ensembles over sigma --------------------------------------------------------------------------
#
# A, B and C are deterministic functions of the noisy image, so Cohen's certificate holds for each as a whole, at any
# one sigma. Choosing a member by the clean image, or by the largest certified radius, is not: that choice is no part
# of the function that is certified. D chooses by the sigma of the certificate, which does not look at the image.


class NoiseEstimator(nn.Module):
    """Guesses from a noisy image which sigma is in it: images -> one logit a sigma, all zero at the start."""

    def __init__(self, channels: int, num_sigmas: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        self.head = _zero_linear(2 * width, num_sigmas)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        return self.head(torch.cat([maps.mean((2, 3)), maps.square().mean((2, 3))], dim=1))


class EnsembleNetwork(nn.Module):
    """Adapters that share one extractor, combined by one of the designs A (logits), B (features), C (noise)."""

    def __init__(self, members: list[CertifyingNetwork], design: str, channels: int) -> None:
        super().__init__()
        self.design = design
        self.extractor = members[0].extractor
        self.adapters = nn.ModuleList(copy.deepcopy(m.adapter) for m in members)
        heads = [copy.deepcopy(m.head) for m in members]
        self.heads = nn.ModuleList(heads if design != "features" else [_mean_linear(heads)])
        self.weights = nn.Parameter(torch.full((len(members),), 1 / len(members))) if design == "features" else None
        self.estimator = NoiseEstimator(channels, len(members)) if design == "noise" else None

    def features(self, images: Tensor) -> Tensor | float:
        """f(x), which all members share, or 0 if they do without."""
        return self.extractor(images) if self.extractor is not None else 0.0

    def member_logits(self, images: Tensor) -> Tensor:
        """[members, B, K]: head_k(f(x) + a_k(x))."""
        z = self.features(images)
        return torch.stack([head(z + adapter(images)) for adapter, head in zip(self.adapters, self.heads, strict=True)])

    def forward(self, images: Tensor) -> Tensor:
        if self.design == "features":
            weighted = [w * adapter(images) for w, adapter in zip(self.weights, self.adapters, strict=True)]
            return self.heads[0](self.features(images) + sum(weighted))
        logits = self.member_logits(images)
        if self.design == "logits":
            return logits.mean(0)
        return torch.einsum("bm,mbk->bk", self.estimator(images).softmax(1), logits)


def _mean_linear(layers: list[nn.Linear]) -> nn.Linear:
    mean = copy.deepcopy(layers[0])
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.copy_(torch.stack([dict(x.named_parameters())[name] for x in layers]).mean(0))
    return mean


def ensemble(members: dict[float, CertifyingClassifier], *, design: str = "logits", seed: int = 0) -> Adapted:
    """One classifier for a range of sigmas from certifying adapters on one frozen extractor.

    Parameters
    ----------
    members : dict of sigma to CertifyingClassifier
        Trained on the same base.
    design : str
        `logits` (A)    F(x) = mean_k head_k(f(x) + a_k(x)); nothing left to train
        `features` (B)  F(x) = head(f(x) + sum_k w_k a_k(x)); w (1/K at first) and head (the mean of the members') train
        `noise` (C)     F(x) = sum_k w_k(x) head_k(f(x) + a_k(x)), w = softmax(g(x)), g a small estimator of the noise
                        level on the noisy image, trained; at first w = 1/K, which is A
        For D, one adapter a sigma and no ensemble, see `PerSigma`.
    seed : int
        For g.

    Raises
    ------
    ValueError
        If members differ in base or are fewer than two, or for an unknown design.
    """
    if design not in DESIGNS:
        raise ValueError(f"design must be one of {', '.join(DESIGNS)}, or use PerSigma(members), got {design!r}")
    members = _checked_members(members)
    first = next(iter(members.values()))
    channels = first.network.adapter.channels
    if channels is None and design == "noise":
        raise ValueError("the members do not say how many channels images have; build them with channels=")
    with seeded(seed):
        network = EnsembleNetwork([m.network for m in members.values()], design, channels)
    network.requires_grad_(False)
    own = ["network.adapters.", "network.heads."]
    if design == "features":
        network.weights.requires_grad_(True)
        network.heads.requires_grad_(True)
        own.append("network.weights")
    if design == "noise":
        network.estimator.requires_grad_(True)
        own.append("network.estimator.")
    settings = dict(design=design, sigmas=list(members), members=[m.settings for m in members.values()])
    made = Adapted(
        network, first, kind=ENSEMBLE_KIND, settings=settings, own=tuple(own),
        base_fingerprint=first.base_fingerprint, class_names=first.class_names, raw=True,
    )  # fmt: skip
    made.base_name, made.name = first.base_name, f"{first.base_name}+{ENSEMBLE_KIND}-{design}"
    return made


def _checked_members(members: dict[float, CertifyingClassifier]) -> dict[float, CertifyingClassifier]:
    members = {float(s): members[s] for s in sorted(members)}
    if len(members) < 2:
        raise ValueError(f"an ensemble needs at least two members, got {len(members)}")
    for sigma, member in members.items():
        if not isinstance(member, CertifyingClassifier) or member.network.adapter is None:
            raise ValueError(f"the member for sigma {sigma:g} must be a CertifyingClassifier with an adapter")
    bases = {(m.base_fingerprint, m.network.extractor is None, len(m.network.head.weight)) for m in members.values()}
    if len(bases) > 1:
        raise ValueError(
            "the members must share one base, classes, and use of its features; they were made on different ones"
        )
    return members


@loads(ENSEMBLE_KIND)
def _load_ensemble(config: dict, base: BaseClassifier, folder: Path, given: dict) -> Adapted:
    settings, members = _checked_settings(config["settings"], folder), {}
    for sigma, member in zip(settings["sigmas"], settings["members"], strict=True):
        adapter = _adapter_of(member, None, folder)
        members[sigma] = remake(certifying, {**config, "settings": member}, base, folder, adapter=adapter)
    return ensemble(members, design=settings["design"]).load_weights(folder)


def _checked_settings(settings: dict, folder: str | Path) -> dict:
    """Those of an ensemble, if they are complete."""
    members, sigmas, design = (settings.get(name) for name in ("members", "sigmas", "design"))
    if not (isinstance(members, list) and isinstance(sigmas, list) and members and len(members) == len(sigmas)):
        raise ValueError(f"{folder}: settings must have members and a sigma for each; restore the folder from a copy")
    check_type(f"{folder}: design", str, design)
    for member in members:
        check_type(f"{folder}: a member's settings", dict, member)
    for sigma in sigmas:
        check_sigma(sigma)
    return settings


class PerSigma:
    """Design D: a member for each certification sigma, the upper reference that an ensemble is compared with.

    It is no classifier: `at(sigma)` gives one.
    """

    def __init__(self, members: dict[float, CertifyingClassifier]) -> None:
        self.members = _checked_members(members)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(self.members)

    def at(self, sigma: float) -> CertifyingClassifier:
        """The member to certify with at this sigma."""
        if float(sigma) not in self.members:
            raise ValueError(f"no adapter for sigma {sigma:g}; there are {', '.join(f'{s:g}' for s in self.members)}")
        return self.members[float(sigma)]

    def save(self, folder: str | Path) -> Path:
        folder = Path(folder)
        for sigma, member in self.members.items():
            member.save(folder / f"sigma-{sigma:g}")
        config = {"kind": PER_SIGMA_KIND, "sigmas": list(self.members)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return folder


@loads(PER_SIGMA_KIND)
def _load_per_sigma(config: dict, base: BaseClassifier, folder: Path, given: dict) -> PerSigma:
    sigmas = config.get("sigmas")
    check_type(f"{folder}: sigmas", list, sigmas)
    return PerSigma({s: load(folder / f"sigma-{s:g}", base) for s in sigmas})
