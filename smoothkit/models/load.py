"""Base classifiers: any network, taking images on [0, 1] at their own resolution and giving logits.

Resize and normalisation live inside, after the noise, so sigma and radius keep the units of the image.
"""

import copy
import difflib
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from smoothkit.data import data_dir
from smoothkit.models.base import BaseClassifier
from smoothkit.records import read_json

PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar"}


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


def _is_half(module: nn.Module) -> bool:
    floats = [v for v in module.state_dict().values() if v.is_floating_point()]
    return all(torch.equal(v, v.half().to(v.dtype)) for v in floats)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, on the CPU; a ValueError names a file that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); restore it from a copy") from None


# --- loading by name -------------------------------------------------------------------------------


def starters() -> list[str]:
    """Names of the starter models that come with the workbook."""
    return sorted(p.parent.name for p in (data_dir() / "starters").glob("*/config.json"))


def starter_card(name: str) -> dict:
    """How a starter was made, its accuracy clean and under noise, its sha256."""
    return read_json(_starter_folder(name) / "card.json", ValueError)


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
    source, _, location = name.partition(":")
    if Path(location or name).suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{name} looks like a pickle, which can run code when loaded; read it with "
            f"torch.load(path, weights_only=True) and save it with timm.models.save_for_hf(..., safe_serialization=True)"
        )
    folder = None
    if source == "starter":
        folder = _starter_folder(location)
        _check_sha256(folder)
    elif source == "local-dir":
        folder = Path(location).expanduser()
        _check_local_dir(folder)
    elif not location:
        _check_timm_name(name)
    stored = {} if folder is None else read_json(folder / "config.json", ValueError, architecture=str)
    try:
        base = _wrapped(_network(name, folder, pretrained, num_classes, model_args), name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged config.json may say anything
        if folder is None:
            raise
        raise ValueError(f"{folder} makes no model with these settings ({_first_line(error)})") from None
    base.made_with = {**stored.get("model_args", {}), **model_args}
    wanted = size or model_args.get("img_size")
    if wanted is not None:
        base.size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    return base.eval()


def _timm():
    """timm, which takes seconds to import and so is not at this file's head, with our networks in its registry."""
    import timm

    from smoothkit.models import resnet_cifar  # noqa: F401

    return timm


def _network(name: str, folder: Path | None, pretrained: bool, num_classes: int | None, model_args: dict) -> nn.Module:
    from safetensors import SafetensorError

    location = name if folder is None else f"local-dir:{folder}"
    try:
        return _timm().create_model(location, pretrained=pretrained, num_classes=num_classes, **model_args)
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


def _wrapped(network: nn.Module, name: str) -> BaseClassifier:
    """The network with the preprocessing of its timm configuration."""
    config = _timm().data.resolve_model_data_config(network)
    channels, *size = config["input_size"]
    return BaseClassifier(
        network,
        mean=config["mean"],
        std=config["std"],
        size=tuple(size) if _wants_fixed_size(network) else None,
        channels=channels,
        interpolation=config["interpolation"] if config["interpolation"] in {"bilinear", "bicubic"} else "bilinear",
        class_names=_class_names(network),
        name=name,
    )


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.split(". ")[0][:200]


def _wants_fixed_size(network: nn.Module) -> bool:
    """Resize to the training size unless the network was made for the data's own size."""
    config = getattr(network, "pretrained_cfg", {})
    return bool(config.get("fixed_input_size")) or min(config.get("input_size", (3, 0, 0))[1:]) >= 96


def _class_names(network: nn.Module) -> tuple[str, ...]:
    timm, config = _timm(), getattr(network, "pretrained_cfg", {})
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
    stated = read_json(folder / "card.json", ValueError, sha256=str)["sha256"]
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
    timm = _timm()
    if timm.is_model(name.split(".")[0]):
        return
    choices = [*timm.list_models(), *timm.list_models(pretrained=True), *(f"starter:{s}" for s in starters())]
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "list names with timm.list_models()"
    raise ValueError(f"unknown model {name!r}; {hint}")
