"""A checkpoint is one file, `checkpoint.pt`: tensors, numbers and texts by name, read without running any code of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothkit.records import write_atomically

CHECKPOINT = "checkpoint.pt"


def write_checkpoint(out: Path, kept: dict[str, Any]) -> None:
    """Put it in place of the one before; at every moment there is a whole one."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CHECKPOINT, lambda file: torch.save(kept, file))


def read_checkpoint(out: Path | None, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What the checkpoint in a folder keeps, if there is one."""
    if out is None or not (out / CHECKPOINT).is_file():
        return None
    try:
        return torch.load(out / CHECKPOINT, weights_only=True, map_location=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a damaged archive raises is as manifold as its bytes
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{out / CHECKPOINT} cannot be read ({what}); move it away and train again") from None


def check_identity(saved: dict, wanted: dict, out: Path) -> None:
    """Refuse to go on with other settings than the run began with."""
    different = [f"{k} was {saved.get(k)!r}, now {wanted.get(k)!r}" for k in wanted if saved.get(k) != wanted[k]]
    if different:
        raise ValueError(f"the checkpoint in {out} is of another run: {'; '.join(different)}")


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training may change: parameters with `requires_grad`, and buffers."""
    moving = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return moving | {name: b.detach() for name, b in model.named_buffers()}


def fill(tensors: dict[str, Tensor], saved: dict[str, Tensor], out: Path) -> None:
    """Copy saved values into tensors of the same names."""
    if tensors.keys() != saved.keys():
        odd = sorted(tensors.keys() ^ saved.keys())
        raise ValueError(f"the checkpoint in {out} is of another model: {len(odd)} names differ, as {odd[0]!r}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
