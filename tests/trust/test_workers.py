"""Work done by other processes gives the counts of one, whoever dies."""

import concurrent.futures
import multiprocessing
import os
import platform

import pytest
import torch
from conftest import ROOT
from inject_faults import KilledOnce, Slow

from smoothbook.cli import main
from smoothkit import Smoothed, data, models
from smoothkit.certify import sequential_rule
from smoothkit.records import open_record
from smoothkit.sampling import run
from smoothkit.sampling.workers import WorkersLost, gpu_pool, spread


def counts(record):
    rows = record.rows().sort_values(["image_id", "purpose", "start"])
    return rows[["image_id", "purpose", "start", "stop", "counts"]].to_numpy().tolist()


@pytest.fixture
def images():
    return data.load("digits", subset="first:6")


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(run, "UNIT_SAMPLES", 1_000)


def sample(images, out=None, network=None, **settings):
    smoothed = Smoothed(network or Slow(0), 0.25, compile=False)
    return smoothed.sample(images, n=1_500, out=out, progress=False, **settings)


def test_threads_and_processes_give_the_same_counts(images, small_units, tmp_path):
    expected = counts(sample(images))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert counts(sample(images, executor=pool)) == expected
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        record = sample(images, tmp_path / "r", executor=pool)
    assert counts(record) == expected and {p["device"] for p in record.provenance()} == {f"cpu {platform.machine()}"}
    how = dict(rule=sequential_rule([0.05, 0.1], n_max=2_000), progress=False)
    one = Smoothed(Slow(0), 0.25, compile=False).sample(images, **how)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert counts(Smoothed(Slow(0), 0.25, compile=False).sample(images, executor=pool, **how)) == counts(one)


def test_a_real_network_travels(images, small_units):
    """A transformer, to a fresh process."""
    smoothed = Smoothed(models.load("starter:digits-vit-0.25"), 0.25, compile=False)
    few = images.take("first:2")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert counts(smoothed.sample(few, n=200, progress=False, executor=pool)) == counts(
            smoothed.sample(few, n=200, progress=False)
        )


def double(shared, unit):
    return shared * unit


def test_the_shared_part_is_sent_once_to_each_worker():
    sent = []
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = dict(spread(pool, double, 2, range(500), sent=lambda: sent.append(1)))
    assert found == {i: 2 * i for i in range(500)}
    assert len(sent) < 200  # while both lack it a few units are on their way; never with each of 500


def test_a_pool_that_breaks_leaves_a_record_that_goes_on(images, small_units, tmp_path):
    expected, network = counts(sample(images)), KilledOnce(tmp_path)
    with (
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool,
        pytest.raises(WorkersLost, match="run again, with a new pool"),
    ):
        sample(images, tmp_path / "r", network, executor=pool)
    kept = len(open_record(tmp_path / "r").rows())
    assert 0 < kept < len(expected)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as again:
        assert counts(sample(images, tmp_path / "r", network, executor=again)) == expected


def test_errors_of_a_worker_are_those_of_one_process(images):
    class Broken(torch.nn.Module):
        def forward(self, images):
            raise ValueError("this network cannot")

    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="this network cannot"):
        list(spread(pool, lambda shared, unit: shared(unit), Broken(), [1]))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        gpu_pool(0)


distributed = pytest.importorskip("distributed", reason="the extra smoothkit[distributed] is not installed")


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes, and one that replaces any that dies."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "trust"), os.environ.get("PYTHONPATH", "")])
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["distributed", "smoothkit.sampling.run", "inject_faults"]
    )
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as running:
        yield running


@pytest.mark.slow
def test_dask_with_a_worker_killed(cluster, images, small_units, tmp_path):
    expected = counts(sample(images))
    with distributed.Client(cluster) as client:
        client.wait_for_workers(2)
        record = sample(images, tmp_path / "r", KilledOnce(tmp_path), executor=client.get_executor())
        assert int((tmp_path / "killed").read_text()) not in client.run(os.getpid).values()
    assert counts(record) == expected


@pytest.mark.slow
def test_the_command_on_a_cluster(cluster, tmp_path, capsys):
    command = ["certify", "--model", "starter:digits-vit-0.25", "--data", "digits", "--sigma", "0.25", "--n", "200",
               "--subset", "first:3", "--no-compile", "--out"]  # fmt: skip
    assert main([*command, str(tmp_path / "there"), "--scheduler", cluster.scheduler_address]) == 0
    assert main([*command, str(tmp_path / "here")]) == 0
    assert counts(open_record(tmp_path / "there")) == counts(open_record(tmp_path / "here"))
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert main([*command, str(tmp_path / "gpus"), "--devices", "all"]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
