"""Votes of a batch go to the histogram of their slot, whatever the mixture, and to nobody where there is NaN."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from smoothkit.kernels import votes as counting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 7, 10, 1000, 1001, 21843]


def awkward(batch: int, num_classes: int, dtype: torch.dtype, num_slots: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties, infinities and NaN; slots of all kinds, in runs and mixed."""
    generator = torch.Generator().manual_seed(batch * num_classes)
    logits = torch.randn(batch, num_classes, generator=generator)
    logits[::3] = logits[::3].round()  # ties of some classes
    logits[1::7] = 0.0  # of all
    logits[2::11] = -torch.inf
    logits[4::13, num_classes // 2 :] = torch.inf
    logits[6::17, -1] = torch.nan
    logits[8::19] = torch.nan
    slots = torch.randint(-1, num_slots, (batch,), generator=generator)
    slots[: batch // 2] = 2
    return logits.to(dtype), slots


def one_by_one(counts: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    counts = counts.clone()
    for row, slot in zip(logits.tolist(), slots.tolist(), strict=True):
        if slot >= 0 and all(x == x for x in row):
            counts[slot, row.index(max(row))] += 1
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_add_votes(num_classes, dtype):
    for batch in (0, 1, 63, 130) if num_classes < 2000 else (0, 20):
        logits, slots = awkward(batch, num_classes, dtype)
        before = torch.arange(5 * num_classes).reshape(5, num_classes)
        expected = one_by_one(before, logits, slots)
        for add in (counting.add_votes, counting.add_votes_reference):
            counts = before.clone()
            assert add(counts, logits, slots) is None
            assert torch.equal(counts, expected)
        turned = before.clone()
        counting.add_votes(turned, logits.T.contiguous().T, slots)  # any strides
        assert torch.equal(turned, expected)


def test_count_votes_reference():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 1, 0], [0, nan, 9], [-inf, -inf, -inf], [0, inf, inf], [0, 1, 2]])
    assert counting.count_votes_reference(logits).tolist() == [2, 1, 1]
    assert counting.count_votes_reference(torch.zeros(0, 3)).tolist() == [0, 0, 0]


def test_padding_and_no_slots():
    logits = torch.ones(3, 2)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    counting.add_votes(counts, logits, torch.tensor([-1, -1, -1]))
    assert counts.sum() == 0
    counting.add_votes(counts[:0], logits, torch.tensor([-1, -1, -1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.zeros(2, 3)}, "counts must be int64"),
        ({"counts": torch.zeros(3, 2, dtype=torch.int64).T}, "contiguous"),
        ({"counts": torch.zeros(2, 0, dtype=torch.int64), "logits": torch.zeros(4, 0)}, "at least one class"),
        ({"logits": torch.zeros(4, 2)}, r"logits must be floating-point \[B, 3\]"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, "logits must be floating-point"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"slots must be int64 \[4\]"),
        ({"slots": torch.zeros(4)}, "slots must be int64"),
        ({"slots": torch.tensor([0, 1, 2, 0])}, "got 0 to 2"),
        ({"slots": torch.tensor([0, 1, -2, 0])}, "got -2 to 1"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    counts, slots = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    given = {"counts": counts, "logits": torch.zeros(4, 3), "slots": slots, **change}
    with pytest.raises(ValueError, match=message):
        counting.add_votes(**given)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_add_votes_is_an_operator(dtype):
    logits, slots = awkward(20, 7, dtype)
    given = (torch.zeros(5, 7, dtype=torch.int64), logits.nan_to_num(), slots)
    assert set(torch.library.opcheck(counting.add_votes, given).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_add_votes_compiles():
    def vote(counts, logits, slots):
        counting.add_votes(counts, logits * 2, slots)
        return counts.sum()

    logits, slots = awkward(40, 10, torch.float32)
    counts = torch.zeros(5, 10, dtype=torch.int64)
    with torch.inference_mode():
        total = torch.compile(vote, fullgraph=True, backend="aot_eager")(counts, logits, slots)
    assert torch.equal(counts, one_by_one(torch.zeros_like(counts), logits, slots)) and total == counts.sum()


@pytest.mark.slow
def test_without_triton_plain_torch_counts():
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "from smoothkit.kernels import votes\n"
        "print(votes._cuda_kernels(), votes._cuda_kernels())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "None"] and done.stderr.count("counted by plain PyTorch") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_classes", CLASSES)
def test_add_votes_on_cuda(num_classes, dtype):
    for batch in (0, 1, 63, 1000):
        logits, slots = awkward(batch, num_classes, dtype)
        expected = torch.zeros(5, num_classes, dtype=torch.int64)
        counts = expected.cuda()
        counting.add_votes_reference(expected, logits, slots)
        for given in (logits.cuda(), logits.T.contiguous().cuda().T):
            counts.zero_()
            counting.add_votes(counts, given, slots.cuda())
            assert torch.equal(counts.cpu(), expected)
