"""Visual prompts: learned tokens beside the image's own, in a timm vision transformer.

Shallow prompts enter before the first block and travel through all; deep ones are replaced before every block by
that block's own. They stand after the class token, carry no position, and are taken out before the final norm, so
that average pooling does not see them.

Reference: Jia et al., "Visual Prompt Tuning", ECCV 2022. arXiv:2203.12119.
"""

import math
from pathlib import Path

import torch
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
from smoothbook.adapters.bottleneck import plain_blocks
from smoothkit.models import BaseClassifier

KIND = "prompts"


class PromptedBlock(nn.Module):
    """A block that inserts prompts after the first `prefix` tokens before it runs, or takes them out after, or both.

    Deep prompts do both in every block, which is what overwriting them before the next block comes to.
    """

    def __init__(
        self, block: nn.Module, *, prompts: nn.Parameter | None, take_out: int, prefix: int, dropout: float
    ) -> None:
        super().__init__()
        self.block, self.take_out, self.prefix = block, take_out, prefix
        self.register_parameter("prompts", prompts)  # [length, dim], or None
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, **attention) -> Tensor:
        first = self.prefix
        if self.prompts is not None:
            inserted = self.drop(self.prompts).expand(len(x), -1, -1)
            x = torch.cat([x[:, :first], inserted.to(x.dtype), x[:, first:]], dim=1)
        x = self.block(x, **attention)
        return torch.cat([x[:, :first], x[:, first + self.take_out :]], dim=1) if self.take_out else x


def prompts(
    base: BaseClassifier,
    *,
    length: int = 10,
    deep: bool = True,
    dropout: float = 0.0,
    head: str = "trained",
    num_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Adapted:
    """A copy of a base classifier with visual prompts.

    They start uniform on +-sqrt(6 / (channels * patch area + width)), as in the released code, so the start is not the
    base's function. Rates are large: 1e-2 with AdamW, 1 to 10 with SGD.

    Parameters
    ----------
    base : BaseClassifier
        Around a timm vision transformer with ordinary blocks.
    length : int
        Prompts a block.
    deep : bool
        In every block, or only before the first (shallow).
    dropout : float
        On the prompts, in training.
    head, num_classes, class_names, seed
        As in `lora`.

    Raises
    ------
    ValueError
        For a network without the block structure that prompts need.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    check_dropout(dropout)
    copied = frozen_copy(base)
    network = copied.network
    blocks = plain_blocks(network, "visual prompts")
    with seeded(seed):
        own = prepare_head(network, head, num_classes)
        for i, block in enumerate(blocks):
            first, last = i == 0, i == len(blocks) - 1
            own_prompts = nn.Parameter(_start(network, length)) if deep or first else None
            take_out = length if deep or last else 0
            blocks[i] = PromptedBlock(
                block, prompts=own_prompts, take_out=take_out, prefix=network.num_prefix_tokens, dropout=dropout
            )
    own += tuple(f"network.blocks.{i}.prompts" for i in range(len(blocks)))
    settings = dict(length=length, deep=deep, dropout=dropout, head=head, num_classes=num_classes)
    return Adapted(network, base, kind=KIND, settings=settings, own=own, class_names=class_names)


def _start(network: nn.Module, length: int) -> Tensor:
    patch = network.patch_embed.proj.weight  # [dim, channels, height, width]
    bound = math.sqrt(6 / (patch[0].numel() + len(patch)))
    return torch.empty(length, network.embed_dim).uniform_(-bound, bound)


@loads(KIND)
def _load(config: dict, base: BaseClassifier, folder: Path, given: dict) -> Adapted:
    return remake(prompts, config, base, folder).load_weights(folder)
