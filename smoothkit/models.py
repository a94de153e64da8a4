"""Base classifiers: any network, taking images on [0, 1] at their own resolution and giving logits.

Resize and normalisation live inside, after the noise, so sigma and radius keep the units of the image.
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothkit.data import data_dir

PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar"}


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
        if type(self).forward is not BaseClassifier.forward or self._forward_hooks or self._forward_pre_hooks:
            return None  # somebody looks at or changes what goes in
        if (self.channels or channels) != channels or (self.size and self.size != tuple(size)):
            return None
        return self.network, *(x.flatten().expand(channels).contiguous() for x in (self.mean, self.std))

    def extra_repr(self) -> str:
        return f"size={self.size}, channels={self.channels}, interpolation={self.interpolation}"


def wrap(network: nn.Module, **preprocessing) -> BaseClassifier:
    """A BaseClassifier around any module; keyword arguments as there."""
    return BaseClassifier(network, **preprocessing)


def save_local(base_classifier: BaseClassifier, folder: str | Path) -> Path:
    """Write a base classifier as `load("local-dir:FOLDER")` reads it: timm's hub layout, safetensors.

    Weights that are all rounded to half precision (see `round_to_half`) are written as such, in half the bytes.

    Parameters
    ----------
    base_classifier : BaseClassifier
        From `load`, without an adapter (merge it first).
    folder : path

    Raises
    ------
    ValueError
        If the network is no plain timm network.
    """
    from timm.models import save_for_hf

    network, folder = base_classifier.network, Path(folder)
    known = getattr(network, "pretrained_cfg", None)
    made_with = base_classifier.made_with
    if type(base_classifier).forward is not BaseClassifier.forward or not known or made_with is None:
        raise ValueError(
            f"{base_classifier.name} is not a timm network from smoothkit.models.load; save an adapter with its save(), or merge "
            f"it first"
        )
    channels, *size = known["input_size"]
    config = {
        "architecture": known["architecture"], "input_size": [base_classifier.channels or channels, *(base_classifier.size or size)],
        "fixed_input_size": bool(known.get("fixed_input_size")), "interpolation": base_classifier.interpolation,
        "crop_pct": 1.0, "mean": base_classifier.mean.flatten().tolist(), "std": base_classifier.std.flatten().tolist(),
        "num_classes": network.num_classes, "label_names": list(base_classifier.class_names) or None,
        "first_conv": known.get("first_conv"), "classifier": known.get("classifier"), "tag": folder.name,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    network_args = {**made_with, "num_classes": network.num_classes}
    written = copy.deepcopy(network).half() if _is_half(network) else network
    save_for_hf(
        written, str(folder), model_config={"pretrained_cfg": config}, model_args=network_args, safe_serialization=True
    )
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    return folder


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


def _is_half(module: nn.Module) -> bool:
    floats = [v for v in module.state_dict().values() if v.is_floating_point()]
    return all(torch.equal(v, v.half().to(v.dtype)) for v in floats)


# --- loading by name -------------------------------------------------------------------------------


def starters() -> list[str]:
    """Names of the starter models that come with the workbook."""
    return sorted(p.parent.name for p in (data_dir() / "starters").glob("*/config.json"))


def starter_card(name: str) -> dict:
    """How a starter was made, its accuracy clean and under noise, its sha256."""
    return json.loads((_starter_folder(name) / "card.json").read_text())


def load(
    name: str, *, pretrained: bool = True, num_classes: int | None = None, size: int | None = None, **model_args
) -> BaseClassifier:
    """A base classifier by name, in eval mode.

    Parameters
    ----------
    name : str
        `starter:NAME` (see `starters()`), `local-dir:FOLDER` with a `config.json` and `model.safetensors`
        as timm writes them, `hf-hub:ORG/MODEL`, or any timm model name.
    pretrained : bool
        Load weights; False gives random ones, from torch's global generator.
    num_classes : int, optional
        A new head of that many classes.
    size : int, optional
        Give the network images of this height and width, in place of the size that it was made for.
    model_args
        Handed to `timm.create_model`; `img_size=32` also sets `size`.

    Raises
    ------
    ValueError
        For an unknown name (the nearest is suggested) or a pickle.
    FileNotFoundError
        If weights are not at hand and cannot be fetched.
    """
    base = _load(name, pretrained, num_classes, model_args)
    wanted = size or model_args.get("img_size")
    if wanted is not None:
        base.size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    return base


def _load(name: str, pretrained: bool, num_classes: int | None, model_args: dict) -> BaseClassifier:
    source, _, location = name.partition(":")
    if Path(location or name).suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{name} looks like a pickle, which can run code when loaded; read it with "
            f"torch.load(path, weights_only=True) and save it with timm.models.save_for_hf(..., safe_serialization=True)"
        )
    if source == "starter":
        folder = _starter_folder(location)
        _check_sha256(folder)
        return _from_timm(f"local-dir:{folder}", name, pretrained, num_classes, model_args)
    if source == "local-dir":
        _check_local_dir(Path(location).expanduser())
        return _from_timm(f"local-dir:{Path(location).expanduser()}", name, pretrained, num_classes, model_args)
    if not location:
        _check_timm_name(name)
    return _from_timm(name, name, pretrained, num_classes, model_args)


def _from_timm(location: str, name: str, pretrained: bool, num_classes: int | None, model_args: dict) -> BaseClassifier:
    import timm
    from safetensors import SafetensorError

    from smoothkit import networks  # noqa: F401  # registers them with timm

    try:
        network = timm.create_model(location, pretrained=pretrained, num_classes=num_classes, **model_args)
    except SafetensorError as error:
        raise ValueError(f"{name}: model.safetensors cannot be read ({error}); fetch or save it again") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" in str(error):
            raise ValueError(
                f"{name}: the weights do not fit the architecture ({str(error).splitlines()[-1].strip()})"
            ) from None
        if isinstance(error, RuntimeError) and "pretrained" not in str(error).lower():
            raise
        raise FileNotFoundError(
            f"the weights of {name} are not at hand ({_first_line(error)}); connect to the network once, set HF_HOME to "
            f"a cache that has them (and HF_HUB_OFFLINE=1 to skip the retries), give local-dir:FOLDER, or take random weights "
            f"with pretrained=False"
        ) from None
    config = timm.data.resolve_model_data_config(network)
    channels, *size = config["input_size"]
    base = BaseClassifier(
        network,
        mean=config["mean"],
        std=config["std"],
        size=tuple(size) if _wants_fixed_size(network) else None,
        channels=channels,
        interpolation=config["interpolation"] if config["interpolation"] in {"bilinear", "bicubic"} else "bilinear",
        class_names=_class_names(network),
        name=name,
    )
    folder = Path(location.removeprefix("local-dir:"))
    stored = json.loads((folder / "config.json").read_text()) if location.startswith("local-dir:") else {}
    base.made_with = {**stored.get("model_args", {}), **model_args}
    return base.eval()


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.split(". ")[0][:200]


def _wants_fixed_size(network: nn.Module) -> bool:
    """Resize to the training size unless the network was made for the data's own size."""
    config = getattr(network, "pretrained_cfg", {})
    return bool(config.get("fixed_input_size")) or min(config.get("input_size", (3, 0, 0))[1:]) >= 96


def _class_names(network: nn.Module) -> tuple[str, ...]:
    import timm

    config = getattr(network, "pretrained_cfg", {})
    if config.get("label_names"):
        return tuple(config["label_names"])
    subset = timm.data.infer_imagenet_subset(network)
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def _starter_folder(name: str) -> Path:
    folder = data_dir() / "starters" / name
    if not (folder / "config.json").is_file():
        near = difflib.get_close_matches(name, starters(), n=1, cutoff=0.3)
        hint = f"did you mean starter:{near[0]}?" if near else f"choose one of {', '.join(starters())}"
        raise ValueError(f"unknown starter {name!r}; {hint}")
    return folder


def _check_sha256(folder: Path) -> None:
    stated = json.loads((folder / "card.json").read_text())["sha256"]
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != stated:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the file its card describes; restore it or run data/make_starters.py"
        )


def _check_local_dir(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}; local-dir: wants a folder written by timm.models.save_for_hf"
        )
    if not (folder / "model.safetensors").is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES]
        if pickles:
            raise ValueError(
                f"{folder} holds a pickle ({pickles[0]}), which can run code when loaded, and no model.safetensors; "
                f"read it with torch.load(path, weights_only=True) and save it with safetensors.torch.save_file"
            )
        raise FileNotFoundError(f"no model.safetensors in {folder}")


def _check_timm_name(name: str) -> None:
    import timm

    from smoothkit import networks  # noqa: F401

    if timm.is_model(name.split(".")[0]):
        return
    choices = [*timm.list_models(), *timm.list_models(pretrained=True), *(f"starter:{s}" for s in starters())]
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "list names with timm.list_models()"
    raise ValueError(f"unknown model {name!r}; {hint}")


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


def fingerprint(module: nn.Module) -> str:
    """sha256 (16 hex digits) over a module's structure, parameter names, types, shapes and values."""
    digest = hashlib.sha256(structure(module).encode())
    for key, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]
