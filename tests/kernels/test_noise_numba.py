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
from test_noise import copies_by_hand

from smoothkit import Purpose
from smoothkit.kernels import noise, philox

numba = pytest.importorskip("numba", reason="numba is not installed: the NumPy reference makes the noise")
from smoothkit.kernels import noise_numba  # noqa: E402

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


def copies(image: torch.Tensor, scale: float, grid: int, n: int, threads: int = 1, **counter) -> np.ndarray:
    """Noisy copies [n, num_pixels] of one image, by the kernel."""
    num_pixels = image.numel()
    rows = torch.from_numpy(philox.rows_of_one_image(num_pixels, stop=counter["start"] + n, **counter))
    out = torch.from_numpy(unwritten(n, num_pixels)).view(n, 1, 1, num_pixels)
    given = (image.view(1, 1, 1, num_pixels), rows, torch.full((n,), scale), counter["seed"], grid)
    noise_numba.noisy_rows_into(out, *given, threads=threads)
    return out.view(n, num_pixels).numpy()


def normals(n: int, num_pixels: int, threads: int = 1, **counter) -> np.ndarray:
    return copies(torch.zeros(num_pixels), 1.0, 0, n, threads, **counter)


def reference(n: int, num_pixels: int, **counter) -> np.ndarray:
    return noise.standard_normal_reference(num_pixels, stop=counter["start"] + n, **counter)


@pytest.fixture(autouse=True)
def threads_for_small_arrays(monkeypatch):
    monkeypatch.setattr(noise_numba, "PIECE", 1000)


@pytest.mark.parametrize("counter", COUNTERS, ids=PURPOSES)
@pytest.mark.parametrize("n", [0, 1, 7, 130])
@pytest.mark.parametrize("num_pixels", SIZES)
def test_normals(num_pixels, n, counter):
    assert same_bits(normals(n, num_pixels, **counter), reference(n, num_pixels, **counter))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 130])
def test_threads_share_the_rows(n, threads, monkeypatch):
    monkeypatch.setattr(noise_numba, "PIECE", 1)
    begun = []

    class Counted(threading.Thread):
        def start(self) -> None:
            begun.append(self)
            super().start()

    monkeypatch.setattr(noise_numba.threading, "Thread", Counted)
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
        expected = copies_by_hand(image, **settings).numpy()
        scale = float(noise.noise_scale(sigma, grid))
        for threads in (1, 2):
            assert same_bits(copies(image, scale, grid or 0, n, threads, **counter), expected.reshape(n, num_pixels))
        assert same_bits(noise.noisy_copies(image, **settings).numpy(), expected)


@pytest.mark.parametrize("grid", [None, 255])
def test_two_million_noisy_values(grid):
    image = (torch.arange(2048) % 256 / 255).reshape(2, 32, 32)
    settings = dict(sigma=0.25, stop=COUNTERS[3]["start"] + 1000, grid=grid, **COUNTERS[3])
    assert same_bits(noise.noisy_copies(image, **settings).numpy(), copies_by_hand(image, **settings).numpy())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile", [8, 100, 4096])
@pytest.mark.parametrize(("planes", "plane"), [(1, 1), (1, 67), (3, 35), (3, 1499), (7, 2), (5, 64)])
def test_noisy_rows(planes, plane, tile, threads, monkeypatch):
    """Any number of planes of any size, made in pieces of any size, in both types and layouts."""
    monkeypatch.setattr(noise_numba, "PIECE", 200)
    n, rng = 9, np.random.default_rng(plane)
    images = torch.from_numpy(rng.random((2, planes, plane, 1), dtype=np.float32))
    word = philox.counter_word(Purpose.ESTIMATE, 2**55 + 3)
    rows = torch.tensor([[i % 3 - 1, word + i, 2**33 + i] for i in range(n)]).T.contiguous()
    scale = torch.linspace(0.1, 100, n)
    norm = (torch.linspace(0.1, 0.5, planes), torch.linspace(0.2, 0.3, planes))
    layouts = (torch.contiguous_format, torch.channels_last)
    for grid, layout, normalise in itertools.product((0, 255), layouts, (False, True)):
        given = (images, rows, scale, -7, grid, *(norm if normalise else ()))
        expected = torch.empty(n, planes, plane, 1)
        noise.noisy_rows_reference(expected, *given)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full_like(expected, torch.nan, dtype=dtype).to(memory_format=layout)
            noise_numba.noisy_rows_into(out, *given, threads=threads, tile=tile)
            assert same_bits(out.float().numpy(), expected.to(dtype).float().numpy())


@numba.njit(error_model="numpy")
def bfloat16_bits_into(out, values):
    for i in range(len(values)):
        out[i] = noise_numba._bfloat16_bits(values[i])


@numba.njit(error_model="numpy")
def box_muller_into(z0, z1, radius_words, angle_words):
    for i in range(len(z0)):
        z0[i], z1[i] = noise_numba._box_muller(radius_words[i], angle_words[i])


def test_rounding_to_bfloat16():
    """Ties, the step to infinity, denormals and NaN: the bits are those of PyTorch."""
    bits = np.arange(0, 2**32, 65_521, dtype=np.uint32)
    edges = [0, 0x8000, 0x8001, 0x7FFF, 0x18000, 0x17FFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0xFF800000]
    bits = np.concatenate([bits, np.array([*edges, *(e | 0x80000000 for e in edges)], dtype=np.uint32)])
    values = bits.view(np.float32)
    made = np.zeros(len(values), dtype=np.uint16)
    bfloat16_bits_into(made, values)
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
    box_muller_into(z0, z1, words, angles)
    expected = philox.box_muller(words, angles)
    assert same_bits(z0, expected[0]) and same_bits(z1, expected[1])


def test_wrong_buffers_are_refused():
    given = (torch.tensor([[0, 0], [1, 1], [0, 1]]), torch.ones(2), 0, 0)
    right, image = torch.zeros(2, 1, 1, 5), torch.zeros(1, 1, 1, 5)
    noise_numba.noisy_rows_into(right, image, *given)
    with pytest.raises(RuntimeError, match="shape"):
        noise_numba.noisy_rows_into(right, image[..., :4], *given)
    with pytest.raises(RuntimeError, match="view"):
        noise_numba.noisy_rows_into(torch.zeros(2, 5, 4, 3).transpose(2, 3), torch.zeros(1, 5, 3, 4), *given)
    for wrong in ((right.double(), image), (right, image.double()), (right.half(), image)):
        with pytest.raises(TypeError):
            noise_numba.noisy_rows_into(*wrong, *given)


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


# --- which backend ------------------------------------------------------------------------------------

DIGEST = (
    "import hashlib\n"
    "import torch\n"
    "from smoothkit.kernels import noise\n"
    "image = (torch.arange(1875) % 256 / 255).reshape(3, 25, 25)\n"
    "counter = dict(seed=2**63 + 7, purpose=4, image_id=2**55 + 3, start=2**33, stop=2**33 + 300)\n"
    "digest = hashlib.sha256(noise.standard_normal(1875, **counter).tobytes())\n"
    "for grid in (None, 255):\n"
    "    digest.update(noise.noisy_copies(image, sigma=0.25, grid=grid, **counter).numpy().tobytes())\n"
    "print(noise.backend(), torch.get_num_threads(), digest.hexdigest())\n"
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
    backend, threads, digest = out.split()
    assert (backend, threads, said) == ("numba", os.environ["OMP_NUM_THREADS"], "")
    return digest


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no numba", "SMOOTHKIT_NO_KERNELS"])
def test_the_bits_are_the_same_without_numba(digest, how):
    out, said = (
        run("sys.modules['numba'] = None\n" + DIGEST) if how == "no numba" else run(DIGEST, SMOOTHKIT_NO_KERNELS="1")
    )
    backend, _, slow = out.split()
    assert (backend, slow, said) == ("numpy", digest, "")


@pytest.mark.slow
def test_numba_that_does_not_compile_is_said_once(digest):
    out, said = run(DIGEST, NUMBA_DISABLE_JIT="1")
    backend, _, slow = out.split()
    assert (backend, slow) == ("numpy", digest) and said.count("the noise is made by NumPy") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_bits_are_noticed(dtype, monkeypatch):
    def one_bit_off(out, *given):
        honest(out, *given)
        if out.dtype == dtype:
            out.view(torch.int32 if dtype == torch.float32 else torch.int16)[-1, -1, -1, -1] ^= 1

    honest = noise_numba.noisy_rows_into
    monkeypatch.setattr(noise_numba, "noisy_rows_into", one_bit_off)
    with pytest.warns(UserWarning, match="gives other bits"):
        assert noise._kernels.__wrapped__(torch.device("cpu")) is None


@pytest.mark.slow
def test_nowhere_to_cache(tmp_path):
    """The compiled code is kept where it can be; where nothing can be written, it is compiled again and works."""
    shutil.copytree(ROOT / "smoothkit", tmp_path / "smoothkit", ignore=shutil.ignore_patterns("__pycache__"))
    blocked, cache = tmp_path / "file", tmp_path / "cache"
    blocked.write_text("a file where a folder is wanted: not even root can write below it")
    (tmp_path / "smoothkit" / "kernels" / "__pycache__").write_text("the same")
    code = (
        "import torch\n"
        "from smoothkit.kernels import noise_numba, philox\n"
        "rows = torch.from_numpy(philox.rows_of_one_image(5, seed=1, purpose=2, image_id=3, start=4, stop=7))\n"
        "out = torch.empty(3, 1, 1, 5)\n"
        "noise_numba.noisy_rows_into(out, torch.zeros(1, 1, 1, 5), rows, torch.ones(3), 1, 0)\n"
        "found = noise_numba._fill_rows.stats\n"
        "print(noise_numba.__file__, found.cache_path, sum(found.cache_hits.values()), out.numpy().tobytes().hex())\n"
    )
    module = str(tmp_path / "smoothkit" / "kernels" / "noise_numba.py")
    bits = reference(3, 5, seed=1, purpose=2, image_id=3, start=4)[:, :5].tobytes().hex()

    def loaded(cache_folder) -> tuple[str, int]:
        environment = dict(HOME=str(blocked), XDG_CACHE_HOME=str(blocked), NUMBA_CACHE_DIR=str(cache_folder))
        out, said = run(code, tmp_path, **environment)
        where, kept, hits, made = out.split()
        assert (where, made, said) == (module, bits, "")
        return kept, int(hits)

    assert loaded(blocked)[0] == "None"
    kept, hits = loaded(cache)
    assert kept.startswith(str(cache)) and list(cache.rglob("*.nbi")) and hits == 0
    assert loaded(cache) == (kept, 1)  # the next process compiles nothing
    for path in cache.rglob("*.nb?"):
        path.write_bytes(b"damaged")
    assert loaded(cache)[1] == 0


@pytest.mark.slow
def test_small_images_stay_with_numpy():
    """Below 1,024 values the noise is a small share of any forward pass, and numba is not even loaded."""
    code = (
        "from smoothkit.kernels import noise\n"
        "noise.standard_normal(64, seed=1, purpose=2, image_id=3, start=0, stop=10)\n"
        "print(noise.backend(64), noise.backend(1023), 'numba' in sys.modules, noise.backend(1024))\n"
    )
    assert run(code)[0].split() == ["numpy", "numpy", "False", "numba"]
