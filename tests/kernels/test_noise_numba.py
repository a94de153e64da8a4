"""The compiled noise has the bits of the NumPy reference, whatever the shape, the counter and the threads."""

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT

from smoothkit import Purpose
from smoothkit.kernels import noise, philox

pytest.importorskip("numba", reason="numba is not installed: the NumPy reference makes the noise")
noise_cpu = pytest.importorskip("smoothkit.kernels.noise_cpu")

COUNTERS = [
    dict(seed=0, purpose=Purpose.TRAIN, image_id=0, start=0),
    dict(seed=2**63 + 7, purpose=Purpose.PILOT, image_id=2**31 + 5, start=200),
    dict(seed=2**64 - 1, purpose=Purpose.ATTACK, image_id=2**56 - 1, start=2**40 - 130),
    dict(seed=2**32, purpose=Purpose.SELECT, image_id=2**55 + 2**31 + 3, start=2**33 + 250),
    dict(seed=2**32 - 1, purpose=Purpose.ESTIMATE, image_id=2**32, start=2**32 - 3),
    dict(seed=3, purpose=Purpose.PREDICT, image_id=2**24 - 1, start=2**31 - 60),
    dict(seed=3, purpose=255, image_id=1, start=2**24 - 60),
]
SIZES = [1, 3, 4, 63, 64, 65, 3072]
PURPOSES = [str(int(c["purpose"])) for c in COUNTERS]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    assert a.dtype == b.dtype == np.float32
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def unwritten(n: int, num_pixels: int) -> np.ndarray:
    return np.full((n, num_pixels), np.nan, dtype=np.float32)


def normals(n: int, num_pixels: int, threads: int = 1, **counter) -> np.ndarray:
    out = unwritten(n, num_pixels)
    noise_cpu.standard_normal_into(out, threads=threads, **counter)
    return out


def reference(n: int, num_pixels: int, **counter) -> np.ndarray:
    return noise.standard_normal_reference(num_pixels, stop=counter["start"] + n, **counter)


@pytest.fixture(autouse=True)
def threads_for_small_arrays(monkeypatch):
    monkeypatch.setattr(noise_cpu, "PIECE", 1000)


def test_constants_are_those_of_the_reference():
    for name in ("LOG_COEFFICIENTS", "COS_COEFFICIENTS", "SIN_COEFFICIENTS"):
        assert getattr(noise_cpu, name) == getattr(noise, name)


@pytest.mark.parametrize("counter", COUNTERS, ids=PURPOSES)
@pytest.mark.parametrize("n", [0, 1, 7, 130])
@pytest.mark.parametrize("num_pixels", SIZES)
def test_normals(num_pixels, n, counter):
    assert same_bits(normals(n, num_pixels, **counter), reference(n, num_pixels, **counter))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 130])
def test_threads_share_the_rows(n, threads, monkeypatch):
    monkeypatch.setattr(noise_cpu, "PIECE", 1)
    begun = []

    class Counted(threading.Thread):
        def start(self) -> None:
            begun.append(self)
            super().start()

    monkeypatch.setattr(noise_cpu.threading, "Thread", Counted)
    assert same_bits(normals(n, 65, threads, **COUNTERS[3]), reference(n, 65, **COUNTERS[3]))
    assert len(begun) == max(0, min(n, threads) - 1)  # the caller's own thread works too


def test_two_million_normals():
    counter = COUNTERS[1]
    expected = reference(1000, 2048, **counter)
    for threads in (1, 2):
        assert same_bits(normals(1000, 2048, threads, **counter), expected)


@pytest.mark.parametrize("grid", [None, 16, 255, 256])
@pytest.mark.parametrize("num_pixels", SIZES)
def test_noisy_copies(num_pixels, grid):
    rng = np.random.default_rng(num_pixels)
    values = rng.random(num_pixels) if grid is None else rng.integers(0, grid + 1, num_pixels) / grid
    image = torch.from_numpy(values.astype(np.float32)).reshape(1, 1, num_pixels)
    for counter, sigma, n in zip(
        COUNTERS, (0.12, 0.25, 0.5, 1.0, 1 / 3, 1e-3, 30.0), (130, 0, 1, 7, 50, 3, 60), strict=True
    ):
        settings = dict(sigma=sigma, stop=counter["start"] + n, grid=grid, **counter)
        expected = noise.noisy_copies_reference(image, **settings).numpy()
        for threads in (1, 2):
            out = unwritten(n, num_pixels)
            scale = noise._float32_at_least(sigma * (grid or 1))
            noise_cpu.noisy_copies_into(
                out, image.numpy().reshape(-1), scale=scale, grid=grid or 0, threads=threads, **counter
            )
            assert same_bits(out, expected.reshape(n, num_pixels))
        assert same_bits(noise.noisy_copies(image, **settings).numpy(), expected)


@pytest.mark.parametrize("grid", [None, 255])
def test_two_million_noisy_values(grid):
    image = (torch.arange(2048) % 256 / 255).reshape(2, 32, 32)
    settings = dict(sigma=0.25, stop=COUNTERS[3]["start"] + 1000, grid=grid, **COUNTERS[3])
    assert same_bits(
        noise.noisy_copies(image, **settings).numpy(), noise.noisy_copies_reference(image, **settings).numpy()
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile", [8, 100, 4096])
@pytest.mark.parametrize(("planes", "plane"), [(1, 1), (1, 67), (3, 35), (3, 1499), (7, 2), (5, 64)])
def test_noisy_rows(planes, plane, tile, threads, monkeypatch):
    """Any number of planes of any size, made in pieces of any size, in both types and layouts."""
    monkeypatch.setattr(noise_cpu, "PIECE", 200)
    n, rng = 9, np.random.default_rng(plane)
    images = torch.from_numpy(rng.random((2, planes, plane, 1), dtype=np.float32))
    word = philox.counter_word(Purpose.ESTIMATE, 2**55 + 3)
    rows = torch.tensor([[i % 3 - 1, word + i, 2**33 + i] for i in range(n)]).T.contiguous()
    scale = torch.linspace(0.1, 100, n)
    norm = (torch.linspace(0.1, 0.5, planes), torch.linspace(0.2, 0.3, planes))
    how = dict(planes=planes, threads=threads, tile=tile)
    for grid, channels_last, normalise in itertools.product((0, 255), (False, True), (False, True)):
        mean, std = norm if normalise else (None, None)
        expected = torch.empty(n, planes, plane, 1)
        noise.noisy_rows_reference(expected, images, rows, scale, -7, grid, mean, std)
        expected = (expected.permute(0, 2, 3, 1) if channels_last else expected).reshape(n, -1)
        arrays = (images.reshape(2, -1).numpy(), rows.numpy(), scale.numpy())
        settings = dict(seed=2**64 - 7, grid=grid, channels_last=channels_last, **how)
        settings |= dict(mean=mean.numpy(), std=std.numpy()) if normalise else {}
        floats, halves = unwritten(n, planes * plane), np.full((n, planes * plane), 0x7FC0, dtype=np.uint16)
        noise_cpu.noisy_rows_into(floats, *arrays, **settings)
        noise_cpu.noisy_rows_into(halves, *arrays, **settings)
        assert same_bits(floats, expected.numpy())
        assert np.array_equal(halves, expected.bfloat16().view(torch.int16).numpy().view(np.uint16))


def test_rounding_to_bfloat16():
    """Ties, the step to infinity, denormals and NaN: the bits are those of PyTorch."""
    bits = np.arange(0, 2**32, 65_521, dtype=np.uint32)
    edges = [0, 0x8000, 0x8001, 0x7FFF, 0x18000, 0x17FFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0xFF800000]
    bits = np.concatenate([bits, np.array([*edges, *(e | 0x80000000 for e in edges)], dtype=np.uint32)])
    values = bits.view(np.float32)
    made = np.zeros(len(values), dtype=np.uint16)
    noise_cpu.bfloat16_bits_into(made, values)
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(made == 0x7FC0, np.isnan(values))
    assert np.array_equal(
        made[~np.isnan(values)], expected.view(torch.int16).numpy().view(np.uint16)[~np.isnan(values)]
    )


def test_edge_words():
    """Words next to 0, one half, the square root of one half and 1, as radius and as angle."""
    f = 2**32 - 1
    edges = [0, 1, 2, 2**24, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**29, f - 1, f]
    edges += [0xB504F332, 0xB504F333, 0xB504F334, 0xB504F335]
    words, angles = (x.ravel().astype(np.uint32) for x in np.meshgrid(edges, edges))
    z0, z1 = np.full((2, words.size), np.nan, dtype=np.float32)
    noise_cpu.box_muller_into(z0, z1, words, angles)
    expected = philox.box_muller(words, angles)
    assert same_bits(z0, expected[0]) and same_bits(z1, expected[1])


def test_image_of_another_type_takes_the_reference():
    settings = dict(sigma=0.25, stop=8, grid=None, seed=1, purpose=Purpose.TRAIN, image_id=1, start=0)
    image = torch.rand(1, 3, 3, dtype=torch.float64)
    noisy = noise.noisy_copies(image, **settings)
    assert noisy.dtype == torch.float64 and torch.equal(noisy, noise.noisy_copies_reference(image, **settings))
    turned = torch.rand(3, 5, 4).transpose(1, 2)  # not contiguous
    assert torch.equal(noise.noisy_copies(turned, **settings), noise.noisy_copies_reference(turned, **settings))


def test_wrong_buffers_are_refused():
    with pytest.raises(ValueError, match="image must have 5 values"):
        noise_cpu.noisy_copies_into(unwritten(2, 5), np.zeros(4, np.float32), scale=1, grid=0, **COUNTERS[0])
    with pytest.raises(TypeError):
        noise_cpu.standard_normal_into(np.zeros((2, 5)), **COUNTERS[0])
    with pytest.raises(TypeError):
        noise_cpu.standard_normal_into(unwritten(5, 4).T, **COUNTERS[0])


def test_callers_in_several_threads():
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: normals(300, 1000, 2, **COUNTERS[i % 2]), range(8)))
    for i, z in enumerate(made):
        assert same_bits(z, made[i % 2])
    assert same_bits(made[0], reference(300, 1000, **COUNTERS[0]))


def _bits_in_child(queue) -> None:
    queue.put(normals(300, 1000, 2, **COUNTERS[0]).view(np.uint32).sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_draw():
    expected = normals(300, 1000, 2, **COUNTERS[0]).view(np.uint32).sum()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_bits_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=600) == expected
    child.join(600)
    assert child.exitcode == 0


# --- which road ------------------------------------------------------------------------------------

DIGEST = (
    "import hashlib\n"
    "import torch\n"
    "from smoothkit.kernels import noise\n"
    "image = (torch.arange(1875) % 256 / 255).reshape(3, 25, 25)\n"
    "counter = dict(seed=2**63 + 7, purpose=4, image_id=2**55 + 3, start=2**33, stop=2**33 + 300)\n"
    "digest = hashlib.sha256(noise.standard_normal(1875, **counter).tobytes())\n"
    "for grid in (None, 255):\n"
    "    digest.update(noise.noisy_copies(image, sigma=0.25, grid=grid, **counter).numpy().tobytes())\n"
    "print(noise.road(), torch.get_num_threads(), digest.hexdigest())\n"
)


def run(code: str, path=ROOT, **environment: str) -> tuple[str, str]:
    """What the code prints and what it says on stderr, in a fresh process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("SMOOTHKIT_NO_KERNELS", "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(path)!r})\n{code}"],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def digest() -> str:
    """Of the bits by numba, in a fresh process."""
    out, said = run(DIGEST)
    road, threads, digest = out.split()
    assert (road, threads, said) == ("numba", os.environ["OMP_NUM_THREADS"], "")
    return digest


@pytest.mark.parametrize("how", ["no numba", "SMOOTHKIT_NO_KERNELS"])
def test_the_bits_are_the_same_without_numba(digest, how):
    out, said = (
        run("sys.modules['numba'] = None\n" + DIGEST) if how == "no numba" else run(DIGEST, SMOOTHKIT_NO_KERNELS="1")
    )
    road, _, slow = out.split()
    assert (road, slow, said) == ("numpy", digest, "")


def test_numba_that_does_not_compile_is_said_once(digest):
    out, said = run(DIGEST, NUMBA_DISABLE_JIT="1")
    road, _, slow = out.split()
    assert (road, slow) == ("numpy", digest) and said.count("the noise is made by NumPy") == 1


def test_other_bits_are_noticed(monkeypatch):
    def one_bit_off(out, **counter):
        honest(out, **counter)
        out.view(np.uint32)[-1, -1] ^= 1

    honest = noise_cpu.standard_normal_into
    monkeypatch.setattr(noise_cpu, "standard_normal_into", one_bit_off)
    with pytest.warns(UserWarning, match="gives other bits"):
        assert noise._kernels.__wrapped__() is None


def test_nowhere_to_cache(tmp_path):
    """The compiled code is kept where it can be; where nothing can be written, it is compiled again and works."""
    shutil.copytree(ROOT / "smoothkit", tmp_path / "smoothkit", ignore=shutil.ignore_patterns("__pycache__"))
    blocked, cache = tmp_path / "file", tmp_path / "cache"
    blocked.write_text("a file where a folder is wanted: not even root can write below it")
    (tmp_path / "smoothkit" / "kernels" / "__pycache__").write_text("the same")
    code = (
        "import numpy as np\n"
        "from smoothkit.kernels import noise_numba\n"
        "out = np.empty((3, 5), dtype=np.float32)\n"
        "noise_numba.standard_normal_into(out, seed=1, purpose=2, image_id=3, start=4)\n"
        "print(noise_numba.__file__, noise_numba._fill_rows.stats.cache_path, out.tobytes().hex())\n"
    )
    module = str(tmp_path / "smoothkit" / "kernels" / "noise_numba.py")
    bits = reference(3, 5, seed=1, purpose=2, image_id=3, start=4)[:, :5].tobytes().hex()

    def loaded(cache_folder) -> str:
        environment = dict(HOME=str(blocked), XDG_CACHE_HOME=str(blocked), NUMBA_CACHE_DIR=str(cache_folder))
        out, said = run(code, tmp_path, **environment)
        where, kept, made = out.split()
        assert (where, made, said) == (module, bits, "")
        return kept

    assert loaded(blocked) == "None"
    assert loaded(cache).startswith(str(cache)) and list(cache.rglob("*.nbi"))
    for path in cache.rglob("*.nb?"):
        path.write_bytes(b"damaged")
    loaded(cache)


def test_small_images_stay_with_numpy():
    """Below 1,024 values the noise is a small share of any forward pass, and numba is not even loaded."""
    code = (
        "from smoothkit.kernels import noise\n"
        "noise.standard_normal(64, seed=1, purpose=2, image_id=3, start=0, stop=10)\n"
        "print(noise.road(64), noise.road(1023), 'numba' in sys.modules, noise.road(1024))\n"
    )
    assert run(code)[0].split() == ["numpy", "numpy", "False", "numba"]
