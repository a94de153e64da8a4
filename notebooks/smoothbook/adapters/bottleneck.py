"""Bottleneck adapters in the blocks of a timm vision transformer.

An adapter narrows the stream to `width`, bends it and widens it again: Up(act(Down(h))). Up starts at zero, so that
the start is the base itself; Down must not, or neither would ever get a gradient.

    houlsby    after the attention and after the MLP, before each is added to the stream:  h + Up(GELU(Down(h)))
    pfeiffer   after the MLP only
    parallel   beside the MLP, reading the stream before its LayerNorm:  MLP(LN(x)) + scale Up(ReLU(Down(x)))

References
----------
Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019; Pfeiffer et al., "AdapterFusion", EACL 2021;
Chen et al., "AdaptFormer", NeurIPS 2022.
"""

import math
from pathlib import Path

from torch import Tensor, nn

from smoothbook.adapters.base import (
    Adapted,
    check_dropout,
    frozen_copy,
    loads,
    prepare_head,
    remake,
    seeded,
)
from smoothkit.models import BaseClassifier

KIND = "bottleneck"
PLACES = ("houlsby", "pfeiffer", "parallel")


class Bottleneck(nn.Module):
    """scale * Up(act(Down(h))) on [..., dim], without the residual; zero at the start."""

    def __init__(self, dim: int, width: int, *, act: type[nn.Module], scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.act = nn.Linear(dim, width), act()
        self.drop, self.up = nn.Dropout(dropout), nn.Linear(width, dim)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * self.up(self.drop(self.act(self.down(h))))


class AdaptedBlock(nn.Module):
    """A timm block with adapters; its forward is the block's own with up to three terms more."""

    def __init__(self, block: nn.Module, place: str, **bottleneck) -> None:
        super().__init__()
        self.block = block
        self.after_attention = Bottleneck(act=nn.GELU, **bottleneck) if place == "houlsby" else None
        self.after_mlp = Bottleneck(act=nn.GELU, **bottleneck) if place in {"houlsby", "pfeiffer"} else None
        self.beside_mlp = Bottleneck(act=nn.ReLU, **bottleneck) if place == "parallel" else None

    def forward(self, x: Tensor, **attention) -> Tensor:
        block = self.block
        h = block.attn(block.norm1(x), **attention)
        if self.after_attention is not None:
            h = h + self.after_attention(h)
        x = x + block.drop_path1(block.ls1(h))
        h = block.mlp(block.norm2(x))
        if self.after_mlp is not None:
            h = h + self.after_mlp(h)
        h = block.drop_path2(block.ls2(h))
        return x + h if self.beside_mlp is None else x + h + self.beside_mlp(x)


def bottleneck(
    base: BaseClassifier,
    *,
    place: str = "parallel",
    width: int | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    head: str = "trained",
    num_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Adapted:
    """A copy of a base classifier with a bottleneck adapter in every block.

    Parameters
    ----------
    base : BaseClassifier
        Around a timm vision transformer with ordinary blocks.
    place : `houlsby`, `pfeiffer` or `parallel`
    width : int, optional
        64, or an eighth of the stream's width for `pfeiffer`, if not given.
    scale : float
        In front of the adapter; AdaptFormer takes 0.1 with SGD.
    dropout : float
        After the activation, in training.
    head, num_classes, class_names, seed
        As in `lora`.

    Raises
    ------
    ValueError
        For an unknown place, or a network without such blocks.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    check_dropout(dropout)
    copied = frozen_copy(base)
    network = copied.network
    blocks = plain_blocks(network, "bottleneck adapters")
    dim = network.embed_dim
    width = width or (max(1, dim // 8) if place == "pfeiffer" else 64)
    with seeded(seed):
        own = prepare_head(network, head, num_classes)
        for i, block in enumerate(blocks):
            blocks[i] = AdaptedBlock(block, place, dim=dim, width=width, scale=scale, dropout=dropout)
    own += tuple(
        f"network.blocks.{i}.{n}." for i in range(len(blocks)) for n in ("after_attention", "after_mlp", "beside_mlp")
    )
    settings = dict(place=place, width=width, scale=scale, dropout=dropout, head=head, num_classes=num_classes)
    return Adapted(network, base, kind=KIND, settings=settings, own=own, class_names=class_names)


@loads(KIND)
def _load(config: dict, base: BaseClassifier, folder: Path, given: dict) -> Adapted:
    return remake(bottleneck, config, base, folder).load_weights(folder)


def plain_blocks(network: nn.Module, what: str) -> nn.Sequential:
    """The blocks of a timm vision transformer.

    Raises
    ------
    ValueError
        For anything else, with what was found.
    """
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(network, VisionTransformer):
        raise ValueError(
            f"{what} need a timm VisionTransformer, got {type(network).__name__}, which has no such blocks; use LoRA "
            f"(targets='convolutions') or a certifying adapter instead"
        )
    odd = {type(b).__name__ for b in network.blocks if type(b) is not Block}
    if odd:
        raise ValueError(f"{what} need the ordinary Block of timm, got {', '.join(sorted(odd))}")
    return network.blocks
