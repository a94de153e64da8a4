"""What a base classifier is, and how it is known again: BaseClassifier, its identity, its fingerprint."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BaseClassifier(nn.Module):
    """A network with its preprocessing: images [B, C, H, W] on [0, 1] -> logits [B, num_classes].

    Parameters
    ----------
    network : nn.Module
        Takes normalised images.
    mean, std : tuple of float
        Per channel, on the [0, 1] scale; one value serves all channels.
    size : (int, int), optional
        Height and width the network wants; images of another size are resized, after the noise.
    channels : int, optional
        Channels the network wants: grey images are repeated for a network that wants colour.
    interpolation : `bilinear` or `bicubic`
    class_names : tuple of str
    name : str
        How records call the model.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        interpolation: str = "bilinear",
        class_names: tuple[str, ...] = (),
        name: str = "",
    ) -> None:
        super().__init__()
        if interpolation not in {"bilinear", "bicubic"}:
            raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
        if any(s <= 0 for s in std):
            raise ValueError(f"std must be above 0, got {std}")
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.size, self.channels, self.interpolation = size, channels, interpolation
        self.class_names, self.name = tuple(class_names), name or type(network).__name__
        self.made_with: dict | None = None  # what timm.create_model was given, if the network came from there

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.preprocess(images))

    def preprocess(self, images: Tensor) -> Tensor:
        """What the network wants of images [B, C, H, W] on [0, 1]: its channels, its size, normalised."""
        if self.channels is not None and images.shape[1] != self.channels:
            if images.shape[1] != 1:
                raise ValueError(
                    f"{self.name} wants {self.channels} channels, got images of shape {tuple(images.shape)}"
                )
            images = images.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode=self.interpolation, antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    def fold(self, shape: tuple[int, int, int]) -> tuple[nn.Module, Tensor, Tensor] | None:
        """The network, and per channel the mean and std it wants, where images of this shape need nothing else.

        Whoever makes the images can then normalise them in the same pass: (images - mean) / std.
        """
        channels, *size = shape
        own = all(
            getattr(type(self), x) is getattr(BaseClassifier, x) and x not in vars(self)
            for x in ("forward", "preprocess")
        )
        if not own or self._forward_hooks or self._forward_pre_hooks:
            return None  # somebody looks at or changes what goes in
        if (self.channels or channels) != channels or (self.size and self.size != tuple(size)):
            return None
        return self.network, *(x.flatten().expand(channels).contiguous() for x in (self.mean, self.std))

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}, interpolation={self.interpolation}"


wrap = BaseClassifier  # the verb: models.wrap(module, mean=..., std=..., size=...)


def round_to_half(module: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Round float parameters and buffers (all, or those named) to what half precision can hold, in place.

    They stay float32; a file of them takes half the bytes and gives the same classifier back, bit for bit.

    Raises
    ------
    ValueError
        If a value is beyond half precision's range.
    """
    wanted = set(module.state_dict() if names is None else names)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in wanted and value.is_floating_point():
                if not bool(value.half().isfinite().all()):
                    raise ValueError(f"{name} has values beyond 65504, which half precision cannot hold")
                value.copy_(value.half())
    return module


@contextlib.contextmanager
def evaluating(base_classifier: object) -> Iterator[None]:
    """A module in eval mode; the mode of each of its parts is given back afterwards."""
    modules = list(base_classifier.modules()) if isinstance(base_classifier, nn.Module) else []
    were_training = [m for m in modules if m.training]
    for m in were_training:
        m.training = False
    try:
        yield
    finally:
        for m in were_training:
            m.training = True


# --- identity --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """What a record needs to know a model again."""

    name: str
    fingerprint: str


def identify(base_classifier: Callable[[Tensor], Tensor], model_id: str | None = None) -> ModelIdentity:
    """Name and fingerprint of a base classifier.

    Modules are fingerprinted by structure and weights; other callables cannot be, and need a `model_id`
    under which the caller vouches that they are the same.
    """
    if isinstance(base_classifier, nn.Module):
        name = model_id or getattr(base_classifier, "name", None) or type(base_classifier).__name__
        return ModelIdentity(str(name), fingerprint(base_classifier))
    if not callable(base_classifier):
        raise ValueError(
            f"base_classifier must be callable on images [B, C, H, W], got {type(base_classifier).__name__}"
        )
    if not model_id:
        raise ValueError(
            "a base classifier that is not an nn.Module cannot be fingerprinted; give model_id=, a name that changes when it does"
        )
    return ModelIdentity(model_id, f"vouched:{model_id}")


def structure(module: nn.Module) -> str:
    """A module as text in the newest torch's words, the same with any: older ones leave out that a norm has a bias."""
    text = repr(module)
    if "bias=" in repr(nn.LayerNorm(1)):
        return text
    return re.sub(r"((?:Layer|Batch|Group|Instance)Norm\w*\([^\n]*?affine=(True|False))", r"\1, bias=\2", text)


def fingerprint(module: nn.Module, *, without: Iterable[str] = ()) -> str:
    """sha256 (16 hex digits) over a module's structure, and the names, types, shapes and values of its tensors.

    `without` names tensors, or submodules, whose values do not count; their place in the structure does.
    """
    left_out = tuple(f"{name}." for name in without)
    digest = hashlib.sha256(structure(module).encode())
    for key, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor) and not f"{key}.".startswith(left_out):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]
