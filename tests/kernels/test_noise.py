"""The bits of the noise, their distribution, and what they may not depend on."""

import itertools
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

from smoothkit import Purpose
from smoothkit.kernels import noise, philox

F = 0xFFFFFFFF
# Known answers for philox4x32-10 published with Random123 1.14 (kat_vectors): counter, key, words
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
BITS = ["3f7dbb31", "bf6cb6b0", "bf1e1b9e", "bef6d1b1"]
EDGE_WORDS = [0, 1, 2, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 0xB504F332, 0xB504F333, 0xB504F334, 3 * 2**29, F - 1, F]


def draw(num_pixels=64, seed=1, purpose=Purpose.ESTIMATE, image_id=5, start=0, stop=100):
    return noise.standard_normal(num_pixels, seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox.philox4x32(counter, key)) == words


def test_counter_layout():
    """block 24 bits, sample 40, image 56, purpose 8, from the lowest bit of the 128-bit counter."""
    block, sample, image, purpose = 0xABCDEF, 0x12_3456_789A, 0xFE_DCBA_9876_5432, 0x5A
    word = np.array([philox.counter_word(purpose, image)])
    words = philox._counter(word, np.array([sample]), np.array([block]))
    value = sum(int(np.asarray(w).ravel()[0]) << 32 * i for i, w in enumerate(words))
    assert value == block | sample << 24 | image << 64 | purpose << 120


def test_standard_normal_is_box_muller_of_the_counter():
    z = draw(num_pixels=10, seed=2**63 + 7, purpose=Purpose.SELECT, image_id=2**55 + 3, start=2**33, stop=2**33 + 1)[0]
    word = np.array([philox.counter_word(Purpose.SELECT, 2**55 + 3)])
    for pixel in range(10):
        counter = philox._counter(word, np.array([2**33]), np.array([pixel // 4]))
        words = [w.astype(np.uint32) for w in philox.philox4x32(counter, (7, 2**31))]
        pair = philox.box_muller(words[pixel % 4 // 2 * 2], words[pixel % 4 // 2 * 2 + 1])
        assert z[pixel] == pair[pixel % 2].item()


@pytest.mark.parametrize(
    ("name", "function", "low", "high"),
    [
        ("LOG_COEFFICIENTS", lambda f: (mpmath.log1p(f) - f + f * f / 2) / f**3, 2**-0.5 - 1, 2**0.5 - 1),
        ("COS_COEFFICIENTS", lambda s: (mpmath.cos(mpmath.sqrt(s)) - 1 + s / 2) / s**2, 0, (np.pi / 4) ** 2),
        ("SIN_COEFFICIENTS", lambda s: (mpmath.sin(mpmath.sqrt(s)) / mpmath.sqrt(s) - 1) / s, 0, (np.pi / 4) ** 2),
    ],
)
def test_coefficients_are_fits_at_chebyshev_nodes(name, function, low, high):
    coefficients = getattr(philox, name)
    n = len(coefficients)
    nodes = np.cos(np.pi * (np.arange(n) + 0.5) / n) * (high - low) / 2 + (low + high) / 2
    with mpmath.workdps(40):
        values = np.array([float(function(mpmath.mpf(float(x)))) for x in nodes])
    fit = np.polynomial.Chebyshev.fit(nodes, values, n - 1, domain=[low, high]).convert(kind=np.polynomial.Polynomial)
    np.testing.assert_allclose(coefficients, fit.coef[::-1], rtol=1e-6)


def test_normals_are_close_to_exact_ones():
    rng = np.random.default_rng(0)
    words = np.concatenate([rng.integers(0, 2**32, 100_000), EDGE_WORDS]).astype(np.uint32)
    angles = np.concatenate([rng.integers(0, 2**32, 100_000), EDGE_WORDS[::-1]]).astype(np.uint32)
    z0, z1 = philox.box_muller(words, angles)
    u, v = (words.astype(np.longdouble) + 0.5) / 2**32, (angles.astype(np.longdouble) + 0.5) / 2**32
    radius = np.sqrt(-2 * np.log(u))
    assert z0.dtype == z1.dtype == np.float32
    assert np.abs(z0 - radius * np.cos(2 * np.pi * v)).max() < 1e-6
    assert np.abs(z1 - radius * np.sin(2 * np.pi * v)).max() < 1e-6
    assert 6.7 < np.hypot(z0, z1).max() < 6.77  # the word 0: tails from 32 bits


def test_samples_follow_the_normal_distribution():
    """Each check fails by chance with probability 1e-4 at a random seed; this seed is fixed."""
    z = draw(num_pixels=1000, stop=1000).ravel().astype(np.float64)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    n = z.size
    assert abs(z.mean()) < 3.9 / np.sqrt(n)
    assert abs(z.var() - 1) < 3.9 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 3.9 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 3.9 * np.sqrt(96 / n)
    assert abs((np.abs(z) > 3).mean() - 2 * stats.norm.sf(3)) < 3.9 * np.sqrt(2 * stats.norm.sf(3) / n)


@pytest.mark.parametrize("other", ["sample", "image", "purpose", "seed", "pixel"])
def test_neighbouring_counters_are_uncorrelated(other):
    """One correlation each over 100,000 pairs; chance of failure 1e-4."""
    a = draw(num_pixels=1000, stop=100)
    b = {
        "sample": lambda: draw(num_pixels=1000, start=1, stop=101),
        "image": lambda: draw(num_pixels=1000, image_id=6),
        "purpose": lambda: draw(num_pixels=1000, purpose=Purpose.PREDICT),
        "seed": lambda: draw(num_pixels=1000, seed=2),
        "pixel": lambda: np.roll(a, 1, axis=1),
    }[other]()
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 3.9 / np.sqrt(a.size)
    assert abs(np.corrcoef(a.ravel() ** 2, b.ravel() ** 2)[0, 1]) < 3.9 / np.sqrt(a.size)


@pytest.mark.parametrize("num_pixels", [1, 3, 4, 65, 3072])
def test_any_range_gives_the_same_samples(num_pixels):
    whole = draw(num_pixels=num_pixels, stop=150)
    pieces = [draw(num_pixels=num_pixels, start=a, stop=b) for a, b in [(0, 1), (1, 8), (8, 8), (8, 150)]]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(whole[:, :1], draw(num_pixels=1, stop=150))


def test_purposes_are_those_of_the_format():
    assert {p.name: p.value for p in Purpose} == {
        "TRAIN": 0, "PILOT": 1, "ATTACK": 2, "SELECT": 3, "ESTIMATE": 4, "PREDICT": 5,
    }  # fmt: skip


def test_bits_are_fixed_for_ever():
    """First values as float32 bits, from this implementation when the format was decided."""
    z = draw(num_pixels=4, seed=0, purpose=Purpose.TRAIN, image_id=0, stop=1)[0]
    words = KNOWN_ANSWERS[0][2]  # counter 0, key 0
    exact = [
        np.sqrt(-2 * np.log((words[i] + 0.5) / 2**32)) * f(2 * np.pi * (words[i + 1] + 0.5) / 2**32)
        for i in (0, 2)
        for f in (np.cos, np.sin)
    ]
    np.testing.assert_allclose(z, exact, atol=5e-7)
    assert [f"{b:08x}" for b in z.view(np.uint32)] == BITS


def copies_by_hand(image: torch.Tensor, *, sigma: float, grid: int | None, **counter) -> torch.Tensor:
    """What `noisy_copies` should make: the formula on the reference's normals, in the arithmetic of NumPy."""
    z, x = noise.standard_normal_reference(image.numel(), **counter), image.reshape(1, -1).numpy()
    noisy = noise.noise_scale(sigma, grid) * z
    noisy = x + noisy if grid is None else (np.rint(x * np.float32(grid)) + np.rint(noisy)) / np.float32(grid)
    return torch.from_numpy(noisy).reshape(len(z), *image.shape)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64"])
@pytest.mark.parametrize("num_pixels", [27, 1200])
def test_images_of_other_types(num_pixels, dtype):
    """Where NumPy adds float32 noise to them as float64, the copies are float64."""
    image = (torch.randint(0, 769, (3, num_pixels // 3, 1)) / 256).to(getattr(torch, dtype))
    for grid in (None, 256):
        settings = dict(sigma=0.25, grid=grid, seed=1, purpose=Purpose.TRAIN, image_id=1, start=0, stop=8)
        noisy = noise.noisy_copies(image, **settings)
        assert noisy.dtype == (torch.float64 if dtype in ("float64", "int64") else torch.float32)
        assert torch.equal(noisy, copies_by_hand(image, **settings))


def test_an_image_off_the_grid_is_refused():
    settings = dict(sigma=0.25, grid=255, seed=1, purpose=Purpose.TRAIN, image_id=1, start=0, stop=8)
    with pytest.raises(ValueError, match=r"0.400 steps off the 1/255 grid; use grid=None"):
        noise.noisy_copies(torch.full((1, 2, 2), 140.4 / 255), **settings)


def test_images_in_any_layout():
    settings = dict(sigma=0.25, grid=None, seed=1, purpose=Purpose.TRAIN, image_id=1, start=0, stop=8)
    for shape in ((3, 5, 4), (3, 25, 20)):
        for image in (
            torch.rand(shape).transpose(1, 2),
            torch.full((1, 1, 1), 0.3).expand(shape),
            torch.rand(shape[1:]),
        ):
            assert torch.equal(noise.noisy_copies(image, **settings), copies_by_hand(image, **settings))


@pytest.mark.parametrize("grid", [255, 256])
def test_grid_noise_does_not_depend_on_the_image(grid):
    """On the grid, adding noise to two images gives the same integer steps: nothing of the image leaks."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, grid + 1, (1, 8, 8)).astype(np.float32) / grid).float() for _ in range(2))
    settings = dict(sigma=0.25, seed=3, purpose=Purpose.ESTIMATE, image_id=1, start=0, stop=200, grid=grid)
    steps = [(noise.noisy_copies(x, **settings).double() * grid).round() - (x.double() * grid).round() for x in (a, b)]
    assert torch.equal(steps[0], steps[1])
    noisy = noise.noisy_copies(a, **settings)
    assert float((noisy.double() * grid - (noisy.double() * grid).round()).abs().max()) < 1e-3
    # variance of rounded noise: sigma² + 1 / (12 grid²)
    assert abs(steps[0].div(grid).std() - np.sqrt(0.25**2 + 1 / (12 * grid**2))) < 3.9 * 0.25 / np.sqrt(2 * 12_800)


def test_float_noise_is_sigma_times_normals():
    image = torch.full((3, 4, 4), 0.5)
    settings = dict(seed=3, purpose=Purpose.ESTIMATE, image_id=1, start=7, stop=20)
    noisy = noise.noisy_copies(image, sigma=0.5, grid=None, **settings)
    z = noise.standard_normal(48, **settings)
    assert torch.equal(noisy, torch.from_numpy(np.float32(0.5) + np.float32(0.5) * z).reshape(13, 3, 4, 4))


def test_scale_is_never_below_sigma():
    for sigma in (0.1, 0.12, 0.25, 1 / 3, 0.7):
        assert float(noise.noise_scale(sigma, None)) >= sigma
        assert float(noise.noise_scale(sigma, None)) - sigma <= 1.2e-7 * sigma
        assert 0 <= float(noise.noise_scale(sigma, 255)) - sigma * 255 <= 1.2e-7 * sigma * 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**64}, "seed must lie"),
        ({"image_id": 2**56}, "image_id must lie"),
        ({"start": 5, "stop": 4}, "start <= stop"),
        ({"stop": 2**40 + 1}, "start <= stop"),
        ({"num_pixels": 0}, "values"),
        ({"purpose": 256}, "purpose must lie"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        draw(**change)


def test_ids_and_digests():
    assert 0 <= philox.image_id("digits:test:4") < 2**56
    assert philox.image_id("digits:test:4") != philox.image_id("digits:test:5")
    image = torch.zeros(1, 2, 2)
    assert philox.content_digest(image) != philox.content_digest(image.reshape(1, 1, 4))
    assert philox.content_digest(image) == philox.content_digest(image.clone())
    assert len({philox.fresh_seed() for _ in range(8)}) == 8


# --- rows of a batch -------------------------------------------------------------------------------

SEED = 2**63 + 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def batch_of(shape: tuple[int, ...], n: int, grid: int, normalise: bool) -> dict:
    """Arguments of `noisy_rows` for rows of four images in any order, some of them padding."""
    rng = np.random.default_rng(n)
    images = rng.integers(0, (grid or 255) + 1, (4, *shape)) / (grid or 255)
    ids = [philox.counter_word(purpose, image) for purpose, image in ((4, 2**31 + 5), (3, 2**56 - 1), (200, 1))]
    rows = [[rng.integers(-1, 4), ids[i % 3], (2**33 + 250, 2**40 - 1, i)[i % 3]] for i in range(n)]
    return dict(
        images=torch.from_numpy(images.astype(np.float32)),
        rows=torch.tensor(rows, dtype=torch.int64).reshape(n, 3).T.contiguous(),
        scale=torch.from_numpy(rng.uniform(0.1, 2, n).astype(np.float32)) * (grid or 1),
        seed=philox.signed_bits(SEED),
        grid=grid,
        mean=torch.tensor((MEAN * 2)[: shape[0]]) if normalise else None,
        std=torch.tensor((STD * 2)[: shape[0]]) if normalise else None,
    )


def unwritten(n: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> torch.Tensor:
    return torch.full((n, *shape), torch.nan, dtype=dtype, device=device).to(memory_format=LAYOUTS[layout])


def row_by_row(out: torch.Tensor, images, rows, scale, seed, grid, mean, std) -> torch.Tensor:
    """What `noisy_rows` should make, one row after another."""
    expected = torch.zeros(out.shape)
    for i, (image, word, sample) in enumerate(rows.T.tolist()):
        if image >= 0:
            word %= 2**64
            counter = dict(seed=seed % 2**64, purpose=word >> 56, image_id=word % 2**56, start=sample)
            z = noise.standard_normal_reference(out[0].numel(), stop=sample + 1, **counter).reshape(out.shape[1:])
            x, s = images[image].numpy(), scale[i].numpy()
            row = x + s * z if grid == 0 else (np.rint(x * np.float32(grid)) + np.rint(s * z)) / np.float32(grid)
            expected[i] = torch.from_numpy(row)
            if mean is not None:
                expected[i] = (expected[i] - mean[:, None, None]) / std[:, None, None]
    return expected.to(out.dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype
    return torch.equal(a.float().cpu().view(torch.int32), b.float().cpu().view(torch.int32))


@pytest.mark.parametrize("grid", [0, 255, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 24, 25), (5, 37, 11), (1, 70, 71)])
def test_noisy_rows(shape, grid):
    for dtype, layout, normalise in itertools.product((torch.float32, torch.bfloat16), LAYOUTS, (False, True)):
        for n in (0, 1, 7, 40):
            given = batch_of(shape, n, grid, normalise)
            out, reference = (unwritten(n, shape, dtype, layout) for _ in range(2))
            strides = out.stride()
            noise.noisy_rows(out, **given)
            noise.noisy_rows_reference(reference, **given)
            expected = row_by_row(out, **given)
            assert same(out, expected) and same(reference, expected)
            assert out.stride() == strides
            assert out[given["rows"][0] < 0].count_nonzero() == 0


@pytest.mark.parametrize("num_pixels", [192, 3072])
@pytest.mark.parametrize("grid", [None, 255])
def test_rows_are_noisy_copies(num_pixels, grid):
    """Rows of one image are what `noisy_copies` makes, wherever they stand in the batch."""
    images = (torch.arange(2 * num_pixels) % 256 / 255).reshape(2, 3, 8, -1)
    counter = dict(seed=SEED, purpose=Purpose.ESTIMATE, image_id=2**55 + 3)
    copies = noise.noisy_copies(images[1], sigma=0.12, grid=grid, start=2**33, stop=2**33 + 30, **counter)
    rows = torch.empty(3, 30, dtype=torch.int64)
    rows[0], rows[1] = 1, philox.counter_word(Purpose.ESTIMATE, 2**55 + 3)
    rows[2] = 2**33 + torch.arange(30).flip(0)
    scale = torch.full((30,), float(noise.noise_scale(0.12, grid)))
    out = unwritten(30, images.shape[1:], torch.float32, "channels_last")
    noise.noisy_rows(out, images, rows, scale, philox.signed_bits(SEED), grid or 0)
    assert same(out.flip(0), copies)


def test_rows_of_nan_and_padding():
    """A scale or an image that is NaN gives NaN, in bfloat16 too; padding is zeros whatever stands beside it."""
    for shape in ((1, 2, 2), (3, 24, 25)):
        given = batch_of(shape, 3, 255, False)
        given["rows"][0] = torch.tensor([0, -1, 1])
        given["scale"][:2] = torch.nan
        given["images"][1] = torch.nan
        for dtype in (torch.float32, torch.bfloat16):
            out = unwritten(3, shape, dtype, "contiguous")
            noise.noisy_rows(out, **given)
            assert out[0].isnan().all() and out[2].isnan().all() and out[1].count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(4, 3, 5, 7, dtype=torch.float64)}, "out must be float32 or bfloat16"),
        ({"out": torch.zeros(4, 3, 7, 5).transpose(2, 3)}, "contiguous or channels_last"),
        ({"images": torch.zeros(4, 3, 5, 6)}, "images must be contiguous"),
        ({"images": torch.zeros(4, 3, 5, 7, dtype=torch.float64)}, "images must be torch.float32"),
        ({"rows": torch.zeros(4, 3, dtype=torch.int64)}, "rows must be"),
        ({"scale": torch.zeros(5)}, "scale must be"),
        ({"mean": torch.zeros(3)}, "mean and std must be given together"),
        ({"grid": -1}, "grid must lie"),
        ({"rows": torch.full((3, 4), 4)}, "indices of the 4 images, got 4 to 4"),
        ({"rows": torch.full((3, 4), -2)}, "indices of the 4 images"),
        ({"rows": torch.tensor([[0], [0], [2**40]]).expand(3, 4)}, "samples in"),
    ],
)
def test_rows_that_do_not_fit(change, message):
    given = {"out": torch.zeros(4, 3, 5, 7), **batch_of((3, 5, 7), 4, 255, False), **change}
    with pytest.raises(ValueError, match=message):
        noise.noisy_rows(**given)


def test_words_as_signed_bits():
    assert [philox.signed_bits(x) for x in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
    assert philox.counter_word(Purpose.ESTIMATE, 5) == 5 + (4 << 56)
    assert philox.counter_word(255, 2**56 - 1) == -1
    with pytest.raises(ValueError, match="value must lie"):
        philox.signed_bits(2**64)
    with pytest.raises(ValueError, match="image_id must lie"):
        philox.counter_word(Purpose.ESTIMATE, 2**56)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noisy_rows_is_an_operator(layout):
    for normalise, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        given = batch_of((3, 5, 7), 4, 255, normalise)
        out = unwritten(4, (3, 5, 7), dtype, layout).zero_()
        assert set(torch.library.opcheck(noise.noisy_rows, (out, *given.values())).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noisy_rows_compiles(layout):
    given = batch_of((3, 5, 7), 6, 255, True)

    def forward(out):
        noise.noisy_rows(out, **given)
        return out.sum(dim=(1, 2, 3))

    out = unwritten(6, (3, 5, 7), torch.float32, layout)
    with torch.inference_mode():
        sums = torch.compile(forward, fullgraph=True, backend="aot_eager")(out)
        assert same(out, row_by_row(out, **given)) and torch.allclose(sums, out.sum(dim=(1, 2, 3)))


@pytest.mark.slow
def test_without_triton_the_cpu_makes_the_noise_of_a_cuda_device():
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch\nfrom smoothkit.kernels import noise\n"
        "device = torch.device('cuda', 0)\n"
        "print(noise._kernels(device), noise._kernels(device), noise.backend(3072, device))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["None", "None"] and done.stdout.split()[2] in ("numba", "numpy")
    assert done.stderr.count("made on the CPU and copied to cuda:0, since triton is not installed") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("grid", [0, 255, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (3, 32, 32), (3, 37, 211)])
def test_noisy_rows_on_cuda(shape, grid):
    assert noise.backend(device="cuda") == "triton"
    for dtype, layout, normalise in itertools.product((torch.float32, torch.bfloat16), LAYOUTS, (False, True)):
        for n in (0, 1, 130):
            given = batch_of(shape, n, grid, normalise)
            out, expected = (unwritten(n, shape, dtype, layout, device) for device in ("cuda", "cpu"))
            noise.noisy_rows(out, **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()})
            noise.noisy_rows_reference(expected, **given)
            assert same(out, expected)
