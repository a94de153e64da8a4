"""The engine on a CUDA device; skipped, saying so, where there is none."""

import pytest
import torch
from torch import nn

from smoothkit import Purpose, data
from smoothkit.sampling.batches import GRAPH_AFTER, Task
from smoothkit.sampling.stream import VoteStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def images(number: int, side: int = 32) -> data.Images:
    steps = torch.randint(0, 256, (number, 3, side, side), generator=torch.Generator().manual_seed(0))
    return data.from_arrays(steps / 255, grid=255, name="random")


class FewPixels(nn.Module):
    """Logits that are pixels: nothing is added up, so every device gives the same votes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(0, 3 * 32 * 32, 311))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, self.index]


def votes_on(device: str, **settings) -> list[list[int]]:
    stream = VoteStream(
        FewPixels(), images(3), sigma=0.5, seed=1, noise="grid:255", batch=256, device=device, **settings
    )
    tasks = [Task(i, Purpose.ESTIMATE, 0, 3_000) for i in range(3)]  # enough for a graph to be recorded
    assert GRAPH_AFTER < 9_000 / 256
    return [counts.tolist() for _, counts, _ in stream.run(tasks)]


def test_same_votes_as_on_the_cpu():
    assert votes_on("cuda") == votes_on("cpu")


def test_a_graph_is_recorded_and_counts_the_same(monkeypatch):
    from smoothkit.sampling import batches

    replayed = votes_on("cuda")
    monkeypatch.setattr(batches, "GRAPH_AFTER", 10**9)
    assert replayed == votes_on("cuda")


def test_nothing_waits_between_checkpoints():
    stream = VoteStream(FewPixels(), images(2), sigma=0.5, seed=1, noise="grid:255", batch=256, device="cuda")
    step = stream._step(torch.zeros(400, stream.num_classes, dtype=torch.int64, device="cuda"))
    (plan,) = stream._plans([Task(0, Purpose.ESTIMATE, 0, 256)])
    for _ in range(GRAPH_AFTER + 2):  # what is set up on first use may wait
        step(plan, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits now raises
    try:
        for _ in range(20):
            step(plan, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precisions(precision):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    settings = dict(sigma=0.5, seed=1, noise="grid:255", batch=256, device="cuda", precision=precision)
    stream = VoteStream(network, images(2), **settings)
    tasks = [Task(i, Purpose.ESTIMATE, 0, 1_000) for i in range(2)]
    assert all(counts.sum() == 1_000 for _, counts, _ in stream.run(tasks))
