"""Benchmarks say what they measured, and keep it."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Linear
from scipy import stats

from smoothbook.bench import engine, loop, measure, memory, overhead, parts, peers
from smoothbook.bench import run as bench
from smoothbook.bench.registry import BENCHMARKS, ON_CUDA
from smoothbook.bench.samples import _compare, _live_on_digits
from smoothbook.cli import main
from smoothkit import data
from smoothkit.types import ABSTAIN

# a second or two each; compiling takes longer than all of them
TINY = {
    "overhead": dict(names=("digits-vit",), precisions=("float32",), rounds=2, seconds=0.02, compiled=False),
    "loop": dict(names=("digits-vit",), rounds=2, seconds=0.02, least=150, compiled=False),
    "noise": dict(shapes=((4, 3, 8, 8), (2, 1, 5, 5)), rounds=2, calls=2),
    "votes": dict(classes=(3, 20), batch=50, rounds=2, calls=2),
    "bounds": dict(many=1_000, few=5, rounds=2, n=1_000),
    "sigma": dict(network="digits-vit", images=4, steps=2, samples=50, rounds=1),
    "balls": dict(sizes=(250, 500), target=600),
    "scaling": dict(numbers=(1, 2), threads=(1,), n=20, rounds=2),
    "panels": dict(images=50, n=1_000, sides=(3,), samples=20, rounds=2),
}


@pytest.fixture
def tiny(monkeypatch):
    """The command line at tiny settings."""
    for name, settings in TINY.items():
        function = BENCHMARKS[name].function(name)
        smaller = lambda function=function, settings=settings, **given: function(**given | settings)  # noqa: E731
        monkeypatch.setattr(f"smoothbook.bench.{BENCHMARKS[name].module}.{name}", smaller)


@pytest.mark.parametrize("name", TINY)
def test_every_benchmark_says_and_keeps(name, tiny, tmp_path, capsys):
    assert main(["bench", name, "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / f"{name}-quick.json").read_text())
    assert out.splitlines()[-1] == f"{name} ratio={saved['ratio']:.2f}" and saved["ratio"] > 0
    assert {"machine", "processor", "python", "torch", "numpy", "threads", "method", "headline"} <= set(saved)
    assert saved["rows"] and all(row.get("ratio", 1) > 0 for row in saved["rows"])
    assert f"{name}: {saved['headline']}" in out


def test_every_benchmark_is_where_the_list_says():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.function(name).__module__ == f"smoothbook.bench.{benchmark.module}" and benchmark.says


def test_every_committed_result_is_of_a_benchmark():
    for path in (ROOT / "data" / "benchmarks").glob("*.json"):
        about = json.loads(path.read_text())
        assert about.get("benchmark", "workbook") in {*BENCHMARKS, "workbook"} and path.stem.startswith(
            about.get("benchmark", "workbook")
        )


# --- measuring ---------------------------------------------------------------------------------------


def test_variants_take_turns():
    order, ticks = [], iter(range(100))
    times = measure.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, now=lambda: float(next(ticks))
    )
    assert order == ["a", "b"] * 3 and times.shape == (3, 2) and (times == 1).all(axis=None)


def test_a_round_is_measured_even_without_time():
    assert len(measure.interleaved({"a": lambda: None}, rounds=5, now=lambda: 0.0, until=0.0)) == 1


def test_spread():
    assert measure.spread("ratio", pd.Series([3.0, 1.0, 2.0])) == {"ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


# --- peers -------------------------------------------------------------------------------------------


def half_space(p: float, sigma: float) -> tuple[Linear, torch.Tensor, float]:
    """A half-space classifier, an image [1, 2, 2] of class 1 with p_A = p, and its radius in closed form."""
    radius = sigma * stats.norm.ppf(p)
    return Linear(torch.tensor([1.0, 0, 0, 0]), radius - 0.5), torch.full((1, 2, 2), 0.5), radius


def test_the_plain_loop_certifies_what_is_true():
    classifier, image, radius = half_space(0.9, sigma=0.5)
    torch.manual_seed(0)
    settings = dict(sigma=0.5, n0=50, alpha=0.001, batch=300, num_classes=2)
    certified = [peers.plain_certify(classifier, image, n=2_000, **settings) for _ in range(5)]
    # a radius is too long with probability 0.001 each; below 0.8 of it (four standard deviations) with less
    assert all(c == 1 and 0.8 * radius < r <= radius for c, r in certified)
    undecided, image, _ = half_space(0.5, sigma=0.5)
    assert peers.plain_certify(undecided, image, n=100, **settings) == (ABSTAIN, 0.0)


def test_the_plain_loop_and_the_engine_agree():
    """The same classifier and image, other draws: shares of votes within five standard deviations of each other."""
    case, n = engine.CASES["digits-vit"], 2_000
    images = engine.images_for(case, 3)
    stream = engine.stream_for(case.make(), images, "cpu")
    torch.manual_seed(0)
    for image, ours in zip(images, engine.certify_with(stream, n0=100, n=n), strict=True):
        settings = dict(sigma=engine.SIGMA, n0=100, n=n, alpha=engine.ALPHA, batch=400, num_classes=10)
        c_a, radius = peers.plain_certify(case.make(), image, **settings)
        if ABSTAIN in (c_a, ours.predicted):  # then the other is close to it
            assert max(radius, ours.radius) < 0.1
            continue
        shares = stats.norm.cdf(np.array([radius, ours.radius]) / engine.SIGMA)
        assert c_a == ours.predicted
        assert abs(shares[0] - shares[1]) < 5 * np.sqrt(2 * shares.max() * (1 - shares.min()) / n)


def test_the_bare_forward_pass_is_that_of_the_engine():
    stream = engine.stream_for(engine.CASES["digits-vit"].make(), data.load("digits", subset="first:1"), "cpu")
    example = stream.example()
    assert len(example) == stream.batch
    with stream.forward.running():
        assert stream.forward(example).shape == (stream.batch, 10)
    assert (
        engine.batches_for(stream, engine.bare_forward(stream), measure.clock("cpu"), 1e-6) * stream.batch > engine.N0
    )


def test_without_art(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "art.estimators.certification.randomized_smoothing", None)
    assert main(["bench", "loop", "--quick", "--out", str(tmp_path)]) == 0
    assert f"note: {peers.ART_MISSING}" in capsys.readouterr().out
    saved = json.loads((tmp_path / "loop-quick.json").read_text())
    assert peers.ART_MISSING in saved["left_out"] and {row["peer"] for row in saved["rows"]} == {
        "plain loop, batch 400"
    }


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = overhead.overhead(quick=True, **TINY["overhead"] | {"compiled": None})
    assert result.left_out == (engine.NO_COMPILER,) and "compiled" not in result.table["road"][0]


def test_without_numba(monkeypatch):
    monkeypatch.setattr("smoothkit.kernels.noise._kernels", lambda device: None)
    assert "made by numpy" in parts.noise(quick=True, **TINY["noise"] | {"shapes": ((2, 3, 20, 20),)}).headline


def test_compiling_pays_after():
    assert loop._pays_after(20.0, 0.001) == pytest.approx(20_000)
    assert loop._pays_after(20.0, -0.001) is None and loop._pays_after(-1.0, 0.001) == 0


# --- parts -------------------------------------------------------------------------------------------


def test_counters_count_alike():
    logits = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    by_loop, ours = np.zeros(7, dtype=np.int64), torch.zeros(1, 7, dtype=torch.int64)
    parts._loop_counter(logits, by_loop)()
    parts._our_counter(logits, ours)()
    assert by_loop.tolist() == ours[0].tolist() and by_loop.sum() == 100


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_function_in_a_process_of_its_own():
    """The bare engine at a small n: what a child measures comes back, and so does why one failed."""
    assert measure.in_a_process(memory._child_memory, "engine", 200)["MB"] >= 0
    with pytest.raises(RuntimeError, match="_child_memory"):
        measure.in_a_process(memory._child_memory, "engine", "no number")


@pytest.mark.slow
def test_memory_grows_with_art_only(tmp_path):
    pytest.importorskip("art", reason="ART is not installed: pip install -e '.[peers]'")
    pytest.importorskip("statsmodels", reason="ART's bound needs statsmodels: pip install -e '.[peers]'")
    result, path = bench.run("memory", quick=True, out=tmp_path, settings={"sizes": (4_000,)})
    row = json.loads(path.read_text())["rows"][0]
    # 4,000 noisy copies of 3x32x32 in float32 are 49 MB; the engine keeps one batch
    assert row["ART MB"] > 49 and row["engine MB"] < 10 and result.ratio > 5


def test_memory_without_art(monkeypatch):
    monkeypatch.setattr(memory, "in_a_process", lambda _, who, n: {"MB": 2.0} if who == "engine" else {"missing": who})
    result = memory.memory(quick=True)
    assert result.left_out == (peers.ART_MISSING,) and result.table["engine MB"].tolist() == [2.0]
    assert np.isnan(result.ratio)


# --- samples -----------------------------------------------------------------------------------------


def test_samples_on_known_probabilities():
    """Easy images stop at the first look, hopeless ones too; close ones run on; accuracy stays."""
    easy = _compare(np.array([0.9999, 0.3]), np.array([True, True]), sigma=0.5, r=0.25, kind="hybrid")
    assert easy["mean"] == easy["median"] == 100 and easy["ratio"] == pytest.approx(100_100 / 200)
    assert easy["fixed"] == easy["sequential"] == 0.5
    close = _compare(np.array([0.6915]), np.array([True]), sigma=0.5, r=0.25, kind="hybrid")
    assert close["mean"] > 50_000


def test_samples_on_published_logs(public_data, tmp_path, capsys):
    assert main(["bench", "samples", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "samples-quick.json").read_text())
    assert out.splitlines()[-1] == f"samples ratio={saved['ratio']:.2f}" and saved["ratio"] >= 28
    for row in saved["rows"]:
        assert abs(row["fixed"] - row["sequential"]) <= 0.002
        if row["data"] == "imagenet" and row["sigma"] == "all":
            assert row["ratio"] >= 40


def test_samples_without_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMOOTHKIT_DATA", str(tmp_path))
    assert main(["bench", "samples"]) == 2
    assert "needs the published logs" in capsys.readouterr().err


def test_samples_live_on_digits():
    row = _live_on_digits(2)
    assert 1 < row["ratio"] <= 100_100 / 200 and row["median"] >= 100 and 0 <= row["sequential"] <= 1


# --- devices -----------------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gpu_without_cuda(no_cuda, tmp_path, capsys):
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "missing are the GPU's overhead, loop, noise, votes, bounds" in err
    assert not list(tmp_path.iterdir())


def test_devices_are_checked(no_cuda):
    with pytest.raises(ValueError, match="no CUDA device here"):
        bench.run("loop", device="cuda")
    with pytest.raises(ValueError, match="memory runs on the CPU only"):
        bench.run("memory", device="cuda")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        bench.run("loop", device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ON_CUDA)
def test_on_a_gpu(name, tmp_path):
    result, path = bench.run(name, quick=True, device="cuda", out=tmp_path, settings=TINY[name])
    assert result.ratio > 0 and path.name == f"{name}-quick-cuda.json"
