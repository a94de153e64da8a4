"""Shared fixtures. One thread a process: the suite runs in several, and threads that wait for each other are slow."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job, and so in every process a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
import torch
from torch import nn

from smoothkit import data, models

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def starter():
    return models.load("starter:digits-vit-0.25")


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder named by SMOOTHKIT_DATA."""
    root = os.environ.get("SMOOTHKIT_DATA")
    if not root:
        pytest.skip("SMOOTHKIT_DATA is not set: no public data at hand")
    return Path(root)


@pytest.fixture(scope="session")
def cohen() -> Path:
    """The logs released with Cohen et al. 2019."""
    if "SMOOTHKIT_DATA" not in os.environ:
        pytest.skip("SMOOTHKIT_DATA is not set, so the released logs of Cohen et al. 2019 are not at hand")
    root = Path(os.environ["SMOOTHKIT_DATA"]) / "cohen2019-logs"
    if not root.is_dir():
        pytest.skip("SMOOTHKIT_DATA holds no folder cohen2019-logs")
    return root


class Linear(nn.Module):
    """Two classes by the sign of w . x + b."""

    def __init__(self, w: torch.Tensor, b: float) -> None:
        super().__init__()
        self.register_buffer("w", w.float())
        self.register_buffer("b", torch.tensor(b))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1) @ self.w + self.b
        return torch.stack([-score, score], dim=1)


@pytest.fixture
def linear():
    return Linear
