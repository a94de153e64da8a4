"""The Triton vote count equals the reference: under Triton's interpreter, and it compiles for sm_90.

The interpreter must be chosen before Triton is imported, so this file runs itself in a process of its own. Where
there is a GPU, tests/kernels/test_votes.py compares the compiled kernel too.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_votes import awkward

from smoothkit.kernels import votes as counting

pytest.importorskip("triton", reason="triton is not installed: plain PyTorch counts")

SIZES = [(classes, batch) for classes in (1, 2, 7, 10) for batch in (0, 1, 63, 130)]
SIZES += [(1000, 20), (1001, 11), (21843, 10)]


@pytest.mark.slow
def test_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["compared", str(3 * len(SIZES))]


def compare_all() -> None:
    from smoothkit.kernels.votes_triton import add_votes_into

    compared = 0
    for num_classes, batch in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits, slots = awkward(batch, num_classes, dtype)
            slots[::7] = 5  # out of range: for nobody, as nothing can wait for a check
            given = logits if dtype == torch.float32 else logits.T.contiguous().T  # any strides
            counts = torch.arange(6 * num_classes).reshape(6, num_classes)
            expected = counts.clone()
            add_votes_into(counts[:5], given, slots)
            counting.add_votes_reference(expected[:5], logits, slots.where(slots < 5, -1))
            assert torch.equal(counts, expected), (num_classes, batch, dtype)
            compared += 1
    print("compared", compared)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from smoothkit.kernels import votes_triton
for kind, classes in (("fp32", 16), ("bf16", 1024)):
    constants = dict(ROWS=min(votes_triton.ROWS, votes_triton.VALUES // classes), CLASSES=classes)
    types = dict(counts_ptr="*i64", logits_ptr="*" + kind, slots_ptr="*i64", num_slots="i64", batch="i64")
    types |= dict(num_classes="i32", row_stride="i64", class_stride="i64", **dict.fromkeys(constants, "constexpr"))
    source = ASTSource(fn=votes_triton._add_votes_kernel, signature=types, constexprs=constants)
    options = dict(num_warps=4, enable_fp_fusion=False)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(len(built.asm["cubin"]))
"""


@pytest.mark.slow
def test_compiles_for_sm_90(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and done.returncode:
        pytest.skip(f"ptxas is not usable here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


if __name__ == "__main__":
    compare_all()
