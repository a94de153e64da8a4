"""LoRA through peft, on timm vision transformers and on convolutions.

A frozen weight W becomes W + (alpha/rank) B A, with A random and B zero: the start is the base itself. Several
adapters, for several sigmas say, live on one backbone under names and are switched by `use`.

References
----------
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. arXiv:2106.09685.
Fu and Wang, "Certified PEFTSmoothing", 2024. arXiv:2404.05350.
"""

import contextlib
import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from smoothbook.adapters.base import (
    Adapted,
    check_dropout,
    frozen_copy,
    head_name,
    loads,
    prepare_head,
    preprocessing_of,
    remake,
    seeded,
    settings_of,
)
from smoothkit.models import BaseClassifier
from smoothkit.models.load import read_tensors

KIND = "lora"
# regular expressions over module names: a plain list of names would match endings, and `proj` the patch embedding
TARGETS = {
    "qkv": r"blocks\.\d+\.attn\.qkv",
    "attention": r"blocks\.\d+\.attn\.(qkv|proj)",
    "blocks": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
}


class LoraClassifier(Adapted):
    """A base classifier with LoRA adapters under names, one of them in use."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.network.peft_config)

    @property
    def active(self) -> str:
        return self.network.active_adapter

    @property
    def is_merged(self) -> bool:
        return bool(self.network.get_model_status().merged_adapters)

    def add(self, name: str, *, seed: int = 0) -> "LoraClassifier":
        """Another adapter of the same shape, with the base's head, starting at the base's function; and use it."""
        _check_name(name)
        if name in self.names:
            raise ValueError(f"there is an adapter {name!r} already; use({name!r}) or choose another name")
        with seeded(seed):
            self.network.add_adapter(name, copy.deepcopy(self.network.peft_config[self.names[0]]))
        return self.use(name)

    def use(self, name: str) -> "LoraClassifier":
        """Answer and train with this adapter; the others are frozen."""
        if name not in self.names:
            raise ValueError(f"no adapter {name!r}; choose one of {', '.join(self.names)}")
        if self.is_merged:
            raise ValueError("an adapter is merged into the weights; call unmerge() first")
        self.network.set_adapter(name)
        return self.train(self.training)

    @contextlib.contextmanager
    def plain(self) -> Iterator[BaseClassifier]:
        """The base's own function, for a while."""
        with self.network.disable_adapter():
            yield self

    def merge(self) -> "LoraClassifier":
        """Put the active adapter into the weights, in place: the same function up to rounding, at the base's cost.

        Certify what will be deployed, merged or not: they are two functions.
        """
        self.network.base_model.merge_adapter()
        return self.eval()

    def unmerge(self) -> "LoraClassifier":
        """Take the adapter out of the weights again; rounding may leave their last bits changed."""
        self.network.base_model.unmerge_adapter()
        return self

    def merged(self) -> BaseClassifier:
        """A plain base classifier without peft, the active adapter in its weights; this one stays as it is."""
        network = copy.deepcopy(self.network).merge_and_unload()
        plain = BaseClassifier(
            network, **preprocessing_of(self), class_names=self.class_names, name=f"{self.name}-merged"
        )
        return plain.requires_grad_(True).eval()

    def train(self, mode: bool = True) -> "LoraClassifier":
        if mode and self.is_merged:
            raise ValueError("a merged adapter cannot be trained; call unmerge() first")
        return super().train(mode)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The active adapter's tensors, under peft's names."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.network, adapter_name=self.active)
        return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}

    def save(self, folder: str | Path) -> Path:
        """A peft folder for each adapter (`FOLDER/NAME`), and `adapter.json`, which names the base."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_merged:
            raise ValueError("an adapter is merged into the weights; call unmerge() before saving")
        for name in self.names:
            # peft writes the adapter named default beside the others' folders: give it one as well
            target = folder / name if name == "default" else folder
            self.network.save_pretrained(str(target), selected_adapters=[name])
            (folder / name / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
            for card in {target / "README.md", folder / name / "README.md"}:  # peft's form with nothing filled in
                card.unlink(missing_ok=True)
        self.settings = {**self.settings, "names": list(self.names), "active": self.active}
        self.write_config(folder)
        return folder


def lora(
    base: BaseClassifier,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str = "blocks",
    dropout: float = 0.0,
    head: str = "trained",
    num_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    name: str = "default",
    seed: int = 0,
) -> LoraClassifier:
    """A copy of a base classifier with LoRA on some of its layers.

    Parameters
    ----------
    base : BaseClassifier
    rank : int
        Of the update B A.
    alpha : float, optional
        The update is scaled by alpha / rank; 2 rank if not given.
    targets : str
        `qkv`, `attention` (qkv and proj) or `blocks` (those and both MLP layers) of a timm vision transformer;
        `convolutions`, all ungrouped ones; or a regular expression that fully matches module names.
    dropout : float
        On the input of A, in training.
    head : `trained` or `frozen`
        A trained head is copied for each adapter and saved with it.
    num_classes, class_names : optional
        A new head for another task.
    name : str
        Of this adapter; without dots.
    seed : int
        For A and a new head.

    Raises
    ------
    ValueError
        If nothing matches `targets`: the candidates are listed.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    check_dropout(dropout)
    _check_name(name)
    copied = frozen_copy(base)
    with seeded(seed):
        own_head = prepare_head(copied.network, head, num_classes)
        pattern = find_targets(copied.network, targets)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=pattern,
            lora_dropout=dropout,
            modules_to_save=[head_name(copied.network)] if own_head else None,
        )
        network = get_peft_model(copied.network, config, adapter_name=name)
    settings = dict(
        rank=rank, alpha=alpha, targets=targets, dropout=dropout, head=head, num_classes=num_classes, name=name
    )
    own = ("network.",)
    return LoraClassifier(network, base, kind=KIND, settings=settings, own=own, class_names=class_names)


@loads(KIND)
def _load(config: dict, base: BaseClassifier, folder: Path, given: dict) -> LoraClassifier:
    settings = settings_of(config, lora, folder, own=("names", "active"))
    names, active = settings.pop("names"), settings.pop("active")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and active in names):
        raise ValueError(f"{folder} names the adapters {names!r}, with {active!r} in use; restore it from a copy")
    model = remake(lora, {**config, "settings": settings}, base, folder, name=names[0])
    for name in names[1:]:
        model.add(name)
    for name in names:
        _fill(model, name, folder / name)
    return model.use(active)


def _fill(model: LoraClassifier, name: str, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    saved = read_tensors(folder / "adapter_model.safetensors")
    expected = model.use(name).adapter_state()
    if saved.keys() != expected.keys():
        odd = sorted(saved.keys() ^ expected.keys())
        raise ValueError(f"{folder} does not fit the adapter: {len(odd)} names differ, as {odd[0]!r}")
    set_peft_model_state_dict(model.network, saved, adapter_name=name)


# --- targets ---------------------------------------------------------------------------------------


def candidates(network: nn.Module) -> list[str]:
    """Names of the layers that LoRA can be put on: linear ones and ungrouped convolutions, without the head."""
    try:
        head = head_name(network)
    except ValueError:
        head = None
    return [
        name
        for name, module in network.named_modules()
        if name != head and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]


def find_targets(network: nn.Module, targets: str) -> str:
    """A regular expression that matches the wanted layers and nothing else.

    Raises
    ------
    ValueError
        If it matches none, with the candidates.
    """
    possible, pattern = candidates(network), TARGETS.get(targets, targets)
    if targets == "convolutions":
        chosen, pattern = [n for n in possible if isinstance(network.get_submodule(n), nn.Conv2d)], None
    else:
        try:
            chosen = list(filter(re.compile(pattern).fullmatch, possible))
        except re.error as error:
            raise ValueError(f"targets={targets!r} is not a regular expression ({error})") from None
    if not chosen:
        counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in possible)
        listed = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
        raise ValueError(
            f"targets={targets!r} matches no layer of {type(network).__name__}; use one of {', '.join(TARGETS)}, convolutions, "
            f"or a regular expression that fully matches some of: {listed}"
        )
    if pattern and all(name in chosen for name, _ in network.named_modules() if re.fullmatch(pattern, name)):
        return pattern
    return "|".join(re.escape(name) for name in chosen)


def _check_name(name: str) -> None:
    if not name or "." in name or "/" in name:
        raise ValueError(
            f"the name of an adapter must not be empty or contain a dot or slash, got {name!r}; sigma 0.25 is `sigma_0_25`"
        )
