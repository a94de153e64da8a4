"""The Triton noise has the bits of the NumPy reference: under Triton's interpreter, and it compiles for sm_90.

The interpreter must be chosen before Triton is imported, so this file runs itself in a process of its own. Where
there is a GPU, tests/kernels/test_noise.py compares the compiled kernel too.
"""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from smoothkit.kernels import noise, philox

triton = pytest.importorskip("triton", reason="triton is not installed: a CPU makes the noise")
import triton.language as tl  # noqa: E402

from smoothkit.kernels.noise_triton import _bfloat16_bits, _box_muller, _rint, noisy_rows_into  # noqa: E402

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


# --- under the interpreter -------------------------------------------------------------------------

CASES = (
    "box_muller_at_edges",
    "rounding_to_integers",
    "rounding_to_bfloat16",
    "rows",
    "several_programs_a_row",
    "rows_out_of_range",
    "the_check_before_first_use",
)


@pytest.mark.slow
def test_interpreted():
    """All cases in one process, as it takes seconds to start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__, *CASES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tuple(done.stdout.split()) == CASES


@triton.jit
def pairs_kernel(radius_ptr, angle_ptr, z0_ptr, z1_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    radius = tl.load(radius_ptr + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    angle = tl.load(angle_ptr + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    z0, z1 = _box_muller(radius, angle)
    tl.store(z0_ptr + i, z0, mask=i < n)
    tl.store(z1_ptr + i, z1, mask=i < n)


@triton.jit
def rint_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _rint(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@triton.jit
def bfloat16_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _bfloat16_bits(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def box_muller_at_edges() -> None:
    f = 2**32 - 1
    edges = [0, 1, 2, 2**24, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**29, f - 1, f]
    edges += [0xB504F332, 0xB504F333, 0xB504F334, 0xB504F335]
    words, angles = (x.ravel().astype(np.uint32) for x in np.meshgrid(edges, edges))
    z = torch.full((2, len(words)), torch.nan)
    signed = (torch.from_numpy(x.view(np.int32)) for x in (words, angles))
    pairs_kernel[(1,)](*signed, z[0], z[1], len(words), BLOCK=512)
    assert same(z, torch.from_numpy(np.stack(philox.box_muller(words, angles))))


def edge_values() -> torch.Tensor:
    halves = torch.cat([torch.arange(-6, 7) / 2, 2.0 ** torch.arange(20, 26)[:, None].add(torch.zeros(4)).ravel()])
    halves[13:] += torch.tensor([-0.5, 0.5, 1, 1.5]).repeat(6)
    bits = torch.tensor([0, 0x8000, 0x8001, 0x7FFF, 0x18000, 0x17FFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 1])
    values = torch.cat([halves, torch.randn(500) * 100, torch.randn(100) * 0.01, bits.int().view(torch.float32)])
    return torch.cat([values, -values, torch.tensor([torch.nan])])


def rounding_to_integers() -> None:
    x = edge_values()
    out = torch.full_like(x, 7.0)
    rint_kernel[(1,)](x, out, len(x), BLOCK=2048)
    assert same(out[:-1], torch.from_numpy(np.rint(x.numpy()))[:-1]) and out[-1].isnan()


def rounding_to_bfloat16() -> None:
    x = edge_values()
    out = torch.full(x.shape, 7, dtype=torch.int16)
    bfloat16_kernel[(1,)](x, out, len(x), BLOCK=2048)
    assert torch.equal(out[:-1], x.bfloat16().view(torch.int16)[:-1]) and out[-1] == 0x7FC0


def compare(shape: tuple[int, ...], n: int, grid: int, dtype: torch.dtype, layout: str, normalise: bool) -> None:
    images = torch.rand(3, *shape)
    ids = [philox.counter_word(purpose, image) for purpose, image in ((4, 2**31 + 5), (200, 2**56 - 1), (3, 1))]
    rows = [(i % 4 - 1, ids[i % 3], (2**33 + 250, 2**40 - 1, i)[i % 3]) for i in range(n)]
    rows = torch.tensor(rows, dtype=torch.int64).reshape(n, 3).T.contiguous()
    norm = (torch.linspace(0.1, 0.5, shape[0]), torch.linspace(0.2, 0.3, shape[0])) if normalise else (None, None)
    given = (images, rows, torch.linspace(0.1, 80, n), philox.signed_bits(2**63 + 7), grid, *norm)
    out = torch.full((n, *shape), torch.nan, dtype=dtype).to(memory_format=LAYOUTS[layout])
    expected = out.clone()
    noisy_rows_into(out, *given)
    noise.noisy_rows_reference(expected, *given)
    assert same(out, expected), (shape, n, grid, dtype, layout, normalise)


def rows() -> None:
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        compare((3, 5, 7), 6, 255, dtype, layout, normalise=True)  # planes that are no whole number of blocks
        compare((2, 2, 6), 4, 256, dtype, layout, normalise=False)  # planes that are
        compare((3, 4, 4), 4, 0, dtype, layout, normalise=True)
        compare((1, 1, 1), 2, 0, dtype, layout, normalise=False)
        compare((3, 5, 7), 0, 0, dtype, layout, normalise=False)


def several_programs_a_row() -> None:
    compare((3, 19, 18), 2, 255, torch.float32, "channels_last", normalise=True)
    compare((1, 32, 40), 2, 0, torch.bfloat16, "contiguous", normalise=False)


def rows_out_of_range() -> None:
    """Where nothing can wait for a check, such a row is NaN: it votes for nobody."""
    rows = torch.tensor([[2, -2, 0, 0, -1, 1], [5] * 6, [0, 0, 2**40, -1, -1, 0]])
    out = torch.zeros(6, 1, 2, 3)
    noisy_rows_into(out, torch.rand(2, 1, 2, 3), rows, torch.ones(6), 1, 0)
    assert out.isnan().all(dim=(1, 2, 3)).tolist() == [True] * 4 + [False] * 2
    assert not out[5].isnan().any()


def the_check_before_first_use() -> None:
    def one_bit_off(out, *given):
        noisy_rows_into(out, *given)
        out.view(torch.int32 if out.dtype == torch.float32 else torch.int16)[1, 0, 0, 0] ^= 1

    assert noise._same_rows(noisy_rows_into, torch.device("cpu"))
    assert not noise._same_rows(one_bit_off, torch.device("cpu"))


# --- compiled without a GPU ------------------------------------------------------------------------

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from smoothkit.kernels import noise_triton
for normalise, bfloat16, last, grid in ((True, True, True, True), (False, False, False, False))[FUSION:]:
    constants = dict(NUM_PIXELS=3072, PLANE=1024, CHANNEL_STRIDE=1 if last else 1024, PIXEL_STRIDE=3 if last else 1)
    constants |= dict(ON_GRID=grid, NORMALISE=normalise, BFLOAT16=bfloat16, BLOCKS=noise_triton.BLOCKS)
    types = dict(out_ptr="*i16" if bfloat16 else "*fp32", images_ptr="*fp32", rows_ptr="*i64", scale_ptr="*fp32")
    types |= dict(mean_ptr="*fp32", std_ptr="*fp32", num_images="i64", batch="i64", seed="i64", grid="fp32")
    source = ASTSource(
        fn=noise_triton._noisy_rows_kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    options = dict(num_warps=noise_triton.WARPS, enable_fp_fusion=FUSION)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("cubin", len(built.asm["cubin"]))
    print(built.asm["ptx"])
"""


def ptx(fusion: bool, cache) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    code = COMPILE.replace("FUSION", str(fusion))
    path = cache / "build.py"  # Triton reads the source of its kernels from files
    path.write_text(code)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and done.returncode:
        pytest.skip(f"ptxas is not usable here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_compiles_for_sm_90_without_fused_operations(tmp_path):
    built = ptx(False, tmp_path)
    assert all(int(size) > 1000 for size in re.findall(r"^cubin (\d+)", built, re.M)) and built.count("cubin ") == 2
    assert "sm_90" in built and "mul.hi.u32" in built and "sqrt.rn.f32" in built and "div.rn.f32" in built
    assert not re.search(r"fma\.\w*\.?f32|sqrt\.approx|div\.(full|approx)|rcp\.|\.ftz", built)
    assert "fma.rn.f32" in ptx(True, tmp_path)  # what the setting keeps out


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in sys.argv[1:]:
        globals()[case]()
        print(case)
