"""What all adapters share: freezing, train mode, the report of trained parameters, and a folder on disk that `load` reads.

An adapter takes a BaseClassifier, copies it, freezes the copy and adds parameters of its own; the result is again a
BaseClassifier, so training, attacks and votes need not know. The classifier it was given is left as it is.
"""

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smoothbook.settings import check_keywords, check_type
from smoothkit.models import BaseClassifier, fingerprint
from smoothkit.models.load import read_tensors
from smoothkit.records import read_json
from smoothkit.types import check_sigma

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
HEADS = ("trained", "frozen")


class Adapted(BaseClassifier):
    """A BaseClassifier with an adapter in or beside its frozen network.

    Parameters
    ----------
    network : nn.Module
        The adapted network; takes what the base's network takes, or images on [0, 1] if `raw`.
    base : BaseClassifier
        Whose preprocessing and names are kept.
    kind : str
        Which adapter, as in the folder's config.
    settings : dict
        Keyword arguments, as JSON, that build the same adapter on the same base again.
    own : tuple of str
        Prefixes of the names in `state_dict()` that belong to the adapter; these are saved.
    base_fingerprint : str, optional
        By `base_identity` and the settings' head, if not given.
    raw : bool
        The network normalises by itself.
    """

    def __init__(
        self,
        network: nn.Module,
        base: BaseClassifier,
        *,
        kind: str,
        settings: dict,
        own: tuple[str, ...],
        base_fingerprint: str | None = None,
        class_names: tuple[str, ...] | None = None,
        raw: bool = False,
    ) -> None:
        preprocessing = {} if raw else preprocessing_of(base)
        names = base.class_names if class_names is None else class_names
        super().__init__(network, **preprocessing, class_names=names, name=f"{base.name}+{kind}")
        self.kind, self.settings, self.own = kind, settings, own
        self.base_name = base.name
        self.base_fingerprint = base_fingerprint or base_identity(base, settings["head"])
        self.to(device_of(base))
        self.train(base.training)

    def train(self, mode: bool = True) -> "Adapted":
        """Frozen parts stay in eval mode: their BatchNorm statistics do not move and their dropout stays off."""
        set_train_mode(self, mode)
        return self

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's own parameters and buffers, by their names in `state_dict()`."""
        state = {k: v for k, v in self.state_dict().items() if k.startswith(self.own)}
        return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}

    def save(self, folder: str | Path) -> Path:
        """Write the adapter, without its base: `adapter.safetensors` and `adapter.json`, which names the base."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.adapter_state(), folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        self.write_config(folder)
        return folder

    def write_config(self, folder: Path) -> None:
        config = {
            "kind": self.kind,
            "settings": self.settings,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "class_names": list(self.class_names),
            "trained": trainable(self).trained,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def load_weights(self, folder: Path) -> "Adapted":
        """Fill in the saved parameters; the base has been checked."""
        saved, own = read_tensors(folder / WEIGHTS), self.adapter_state()
        if saved.keys() != own.keys():
            odd = sorted(saved.keys() ^ own.keys())
            raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {len(odd)} names differ, as {odd[0]!r}")
        for name, value in saved.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{folder / WEIGHTS}: {name} has shape {tuple(value.shape)}, the model {tuple(own[name].shape)}"
                )
        self.load_state_dict(saved, strict=False)
        return self


# --- train mode and the report ---------------------------------------------------------------------


def set_train_mode(module: nn.Module, mode: bool = True) -> None:
    """Train mode for what is trained, eval mode for what is frozen.

    A submodule whose parameters are all frozen goes into eval mode with all it contains; one without parameters, as
    dropout, follows what contains it.
    """

    def visit(part: nn.Module, inherited: bool) -> None:
        parameters = list(part.parameters())
        part.training = mode and any(p.requires_grad for p in parameters) if parameters else inherited
        for child in part.children():
            visit(child, part.training)

    visit(module, mode)


@dataclasses.dataclass(frozen=True)
class Trainable:
    """How many parameters a model trains, and which; equal tensors of a stack of blocks are summed in `parts`."""

    trained: int
    total: int
    parts: dict[str, int]

    @property
    def share(self) -> float:
        return self.trained / max(1, self.total)

    def __str__(self) -> str:
        parts = "; ".join(f"{name} {count:,}" for name, count in self.parts.items())
        return f"{self.trained:,} of {self.total:,} parameters trained ({self.share:.2%}): {parts or 'none'}"


def trainable(model: nn.Module) -> Trainable:
    """The parameters of a model that have `requires_grad`."""
    parts: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            part = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix("network."))
            parts[part] = parts.get(part, 0) + parameter.numel()
    return Trainable(sum(parts.values()), total, parts)


# --- the base --------------------------------------------------------------------------------------


def preprocessing_of(base: BaseClassifier) -> dict:
    """The keyword arguments of BaseClassifier that hold its preprocessing."""
    return dict(
        mean=tuple(base.mean.flatten().tolist()),
        std=tuple(base.std.flatten().tolist()),
        size=base.size,
        channels=base.channels,
        interpolation=base.interpolation,
    )


def check_plain(base: BaseClassifier) -> None:
    """Refuse what is no BaseClassifier, or has an adapter already."""
    if not isinstance(base, BaseClassifier):
        raise ValueError(
            f"base must be a BaseClassifier, got {type(base).__name__}; load one with smoothkit.models.load, or put "
            f"smoothkit.models.wrap around a module"
        )
    if isinstance(base, Adapted):
        raise ValueError(f"base is already adapted ({base.name}); give the plain base classifier, or merge it first")


def frozen_copy(base: BaseClassifier) -> BaseClassifier:
    """A copy whose parameters are not trained. The base itself may go on being trained."""
    check_plain(base)
    return copy.deepcopy(base).requires_grad_(False)


def device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def head_name(network: nn.Module) -> str:
    """The name of the last linear layer, which gives the logits."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and (
            module is head or (head is None and name in {"head", "fc", "classifier"})
        ):
            return name
    raise ValueError(
        f"cannot find the head of {type(network).__name__}: no linear layer from get_classifier(), nor one named head, fc or "
        f"classifier"
    )


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def prepare_head(network: nn.Module, head: str, num_classes: int | None) -> tuple[str, ...]:
    """Train the head, or leave it frozen, or put in a new one; returns the prefixes of what is now the adapter's.

    `num_classes` makes a new random head, which is always trained: noise and a new task in one pass.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if num_classes is None and head == "frozen":
        return ()
    name = head_name(network)
    if num_classes is not None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if head == "frozen":
            raise ValueError("a new head (num_classes=) starts at random and must be trained; give head='trained'")
        replace_module(network, name, nn.Linear(network.get_submodule(name).in_features, num_classes))
        if hasattr(network, "num_classes"):
            network.num_classes = num_classes  # timm writes it into a saved network's config
    network.get_submodule(name).requires_grad_(True)
    return (f"network.{name}.",)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random initial values from a seed, leaving the global generator as it was. Only the CPU's: values are made there."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


# --- a saved adapter -------------------------------------------------------------------------------

# kind -> (config, base, folder, given) -> the adapter on its base; `given` holds what `load` was given beside them
LOADERS: dict[str, Callable[[dict, BaseClassifier, Path, dict], Any]] = {}


def loads(kind: str) -> Callable[[Callable], Callable]:
    """A decorator: the function reads adapters of this kind back."""

    def register(loader: Callable) -> Callable:
        LOADERS[kind] = loader
        return loader

    return register


def load(
    folder: str | Path,
    base: BaseClassifier,
    *,
    box: Callable[[Tensor], Tensor] | None = None,
    adapter: nn.Module | None = None,
) -> Any:
    """Read back an adapter of any kind, on the base it was made for.

    Parameters
    ----------
    folder : path
        Written by its `save`.
    base : BaseClassifier
        For a coordinator its encoder, which may be a plain module.
    box : BlackBox or callable
        The black box behind a coordinator.
    adapter : nn.Module
        The module that `certifying` was given, if it was one of your own.

    Returns
    -------
    Adapted or PerSigma

    Raises
    ------
    ValueError
        If it was made for another base or box, its kind is unknown, or what no folder holds is not given.
    FileNotFoundError
        If the folder holds no adapter.
    """
    config = read_config(folder)
    return LOADERS[config["kind"]](config, base, Path(folder), {"box": box, "adapter": adapter})


def remake(make: Callable, config: dict, base: BaseClassifier, folder: Path, **changed: Any) -> Any:
    """What a config describes, on the base it was made for, before the weights are read; `changed` are other settings."""
    settings = settings_of(config, make, folder)
    check_base(config, base_identity(base, settings["head"]), base, folder)
    return make(base, **{**settings, **changed}, class_names=tuple(config["class_names"]))


def base_identity(base: BaseClassifier, head: str) -> str:
    """The fingerprint that an adapter's folder keeps of its base.

    A head of the adapter's own is saved with it, so the one that came with the base, often random, does not count.
    """
    own_head = head in {"trained", "new"}
    return fingerprint(base, without=(f"network.{head_name(base.network)}",) if own_head else ())


def read_config(folder: str | Path) -> dict:
    """The config of a saved adapter: its kind is known, and its parts are of the right types."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}; adapters are folders written by their save()")
    config = read_json(path, ValueError, kind=str)
    if config["kind"] not in LOADERS:
        raise ValueError(f"{folder} holds an adapter of kind {config['kind']!r}, which load does not know")
    if "sigmas" in config:  # one adapter a sigma, each in a folder of its own
        for sigma in check_type(f"{path}: sigmas", list[float], config["sigmas"]):
            check_sigma(sigma)
        return config
    for name, kind in (("settings", dict), ("base", dict), ("class_names", list[str])):
        check_type(f"{path}: {name}", kind, config.get(name))
    for name in ("name", "fingerprint"):
        check_type(f"{path}: base's {name}", str, config["base"].get(name))
    return config


def settings_of(config: dict, function: Callable, folder: str | Path, *, own: tuple[str, ...] = ()) -> dict:
    """The settings of a saved adapter, once they are known to be keyword arguments of the function that makes it.

    `own` are those that are not, but must be there.
    """
    settings = config["settings"]
    missing = [name for name in ("head", *own) if name not in settings]
    if missing:
        raise ValueError(f"{Path(folder) / CONFIG}: settings lack {', '.join(missing)}; restore the folder from a copy")
    keywords = {k: v for k, v in settings.items() if k not in own and (k, v) != ("adapter", None)}  # a module, not kept
    check_keywords(f"{Path(folder) / CONFIG}: settings", function, keywords, leave_out=("base", "class_names"))
    return dict(settings)


def check_base(config: dict, identity: str, base: BaseClassifier, folder: str | Path) -> None:
    """Refuse an adapter that was made for another base.

    Raises
    ------
    ValueError
        Naming both.
    """
    if config["base"]["fingerprint"] != identity:
        raise ValueError(
            f"the adapter in {folder} belongs to {config['base']['name']!r} (fingerprint {config['base']['fingerprint']}), "
            f"not to {base.name!r} ({identity}); load that base"
        )
