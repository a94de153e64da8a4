"""The engine: votes that depend on nothing but (model, images, sigma, seed)."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from smoothkit import Purpose, Smoothed, data, models, noisy_copies
from smoothkit.kernels.noise_exact import exact_noisy_copies
from smoothkit.kernels.votes import count_votes_reference
from smoothkit.records import RecordError, open_record
from smoothkit.sampling import run as run_module
from smoothkit.sampling import stream as stream_module
from smoothkit.sampling.batches import Task
from smoothkit.sampling.run import collect_votes
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import StoppingRule


def stream(base_classifier, images, **settings) -> VoteStream:
    return VoteStream(base_classifier, images, **{"sigma": 0.25, "seed": 0, **settings})


def counts_of(record) -> dict[int, tuple]:
    table = record.votes()
    rows = zip(table["image_id"], table["counts_selection"], table["counts_estimation"], strict=True)
    return {i: (tuple(a.tolist()), tuple(b.tolist())) for i, a, b in rows}


def test_votes_equal_a_plain_loop(starter, digits):
    """The slow way, image by image and at the engine's batch size, counts the same votes."""
    images, n = digits.take("first:3"), 250
    for task, counts, batch in stream(starter, images, batch=50).run(
        [Task(i, Purpose.ESTIMATE, 0, n) for i in range(3)]
    ):
        noisy = noisy_copies(
            images[task.image],
            sigma=0.25,
            seed=0,
            purpose=Purpose.ESTIMATE,
            image_id=images.ids[task.image],
            start=0,
            stop=n,
            grid=256,
        )
        with torch.inference_mode():
            expected = sum(count_votes_reference(starter(noisy[i : i + 50])) for i in range(0, n, 50))
        assert counts.tolist() == expected.tolist() and counts.sum() == n and batch == 50


@pytest.mark.parametrize("tasks", [[(0, 0, 1)], [(0, 3, 4), (1, 0, 7)], [(i % 5, 0, 1 + i) for i in range(150)]])
def test_any_mixture_of_tasks(tasks, digits):
    """Short and many tasks: more than a group, none a multiple of the batch."""

    def brightest_row(images):  # ten classes from pixels alone, and cheap
        return torch.cat([images[:, 0].sum(2), images[:, 0].sum(1)[:, :2]], dim=1)

    images = digits.take("first:5")
    work = [Task(i, Purpose.SELECT, a, b) for i, a, b in tasks]
    results = list(stream(brightest_row, images, batch=37).run(work))
    assert [task for task, *_ in results] == work
    for task, counts, _ in results:
        noisy = noisy_copies(
            images[task.image], sigma=0.25, seed=0, purpose=Purpose.SELECT, image_id=images.ids[task.image],
            start=task.start, stop=task.stop, grid=256,
        )  # fmt: skip
        assert counts.tolist() == count_votes_reference(brightest_row(noisy)).tolist()


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (5, 4), (-1, 4)])
def test_tasks_without_samples(start, stop):
    with pytest.raises(ValueError, match="0 <= start < stop"):
        Task(0, Purpose.SELECT, start, stop)


@pytest.mark.slow
def test_submissions_of_1_7_and_256_images_give_equal_votes(starter, digits):
    """The whole, pieces of 7, and single images; each piece a run of its own."""
    smoothed = Smoothed(starter, 0.25)
    settings = dict(n0=10, n=40, alpha=0.01, progress=False)
    whole = counts_of(smoothed.sample(digits.take("first:256"), **settings))
    assert len(whole) == 256
    for size, starts in ((7, (0, 7, 245)), (1, (0, 100, 255))):
        for start in starts:
            piece = counts_of(smoothed.sample(digits.take(f"range:{start}:{start + size}"), **settings))
            assert len(piece) == size and all(whole[i] == votes for i, votes in piece.items())


def test_the_same_command_twice_gives_identical_counts(starter, digits, tmp_path):
    settings = dict(sigma=0.25, stopping_rule=StoppingRule(50, 150, 0.01), progress=False)
    first, second = (collect_votes(starter, digits.take("first:4"), out=tmp_path / x, **settings) for x in "ab")
    assert counts_of(first) == counts_of(second)
    assert counts_of(collect_votes(starter, digits.take("first:4"), seed=1, **settings)) != counts_of(first)


def test_a_finished_record_is_not_sampled_again(starter, digits, tmp_path):
    settings = dict(sigma=0.25, stopping_rule=StoppingRule(20, 120, 0.01), progress=False, out=tmp_path / "r")
    record = collect_votes(starter, digits.take("first:2"), **settings)
    parts = {p: p.stat().st_mtime_ns for p in record.parts()}
    again = collect_votes(starter, digits.take("first:2"), **settings)
    assert {p: p.stat().st_mtime_ns for p in again.parts()} == parts


def test_ctrl_c_keeps_what_was_finished(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "FLUSH_SECONDS", 0.0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 20:
            raise KeyboardInterrupt

    settings = dict(sigma=0.25, stopping_rule=StoppingRule(100, 300, 0.01), progress=False, batch=50)
    images = digits.take("first:6")
    hook = network.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_votes(network, images, out=tmp_path / "r", **settings)
    hook.remove()
    kept = open_record(tmp_path / "r")
    assert 4 <= len(kept.rows()) < 18  # some of the 6 images x (1 selection + 2 estimation) blocks
    resumed = collect_votes(network, images, out=tmp_path / "r", **settings)
    assert counts_of(resumed) == counts_of(collect_votes(network, images, **settings))
    assert len(resumed.parts()) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from smoothkit import Smoothed, data
from smoothkit.sampling import run, stream

class Killed(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.register_buffer("w", torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        if self.folder is not None and len(list(self.folder.glob("parts/part-*.parquet"))) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle of its work
        return images.flatten(1) @ self.w

def sample(out, folder=None):
    run.PART_SECONDS = stream.FLUSH_SECONDS = 0.0
    images = data.load("digits", subset="first:30")
    return Smoothed(Killed(folder), 0.25, compile=False).sample(images, n0=100, n=1_000, out=out, progress=False)
"""


@pytest.mark.slow
def test_sigkill_and_resume_give_identical_counts(tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    command = f"{KILLED}\nsample(sys.argv[1], Path(sys.argv[1]))"
    killed = subprocess.run([sys.executable, "-c", command, str(folder)], capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(open_record(folder).rows()) < 90, "killed in the middle"
    monkeypatch.setattr(run_module, "PART_SECONDS", run_module.PART_SECONDS)  # given back afterwards
    monkeypatch.setattr(stream_module, "FLUSH_SECONDS", stream_module.FLUSH_SECONDS)
    exec(KILLED, here := {})
    resumed, undisturbed = here["sample"](folder), here["sample"](None)
    assert counts_of(resumed) == counts_of(undisturbed) and len(counts_of(resumed)) == 30


def test_nan_rows_vote_for_nobody_and_count(digits):
    def sometimes_nan(images):
        logits = torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), 0.3)], dim=1)
        return torch.where(images[:, :1, 0, 0] > 0.2, float("nan"), logits)

    record = collect_votes(
        sometimes_nan,
        data.from_arrays(digits.batch(0, 1)),
        sigma=0.25,
        stopping_rule=StoppingRule(100, 1_000, 0.01),
        progress=False,
    )
    row = record.votes().iloc[0]
    share = row["counts_estimation"].sum() / 1_000  # P(N(0, 0.25²) <= 0.2) = 0.788
    assert row["n"] == 1_000 and abs(share - 0.788) < 4 * np.sqrt(0.788 * 0.212 / 1_000)


def test_exact_grid_noise(starter, digits):
    """Its votes are those of its copies, also where the normalisation is folded in; the record names it."""
    images = digits.take("first:2")
    record = Smoothed(starter, 0.25).sample(images, n0=10, n=130, alpha=0.01, noise="exact-grid", progress=False)
    assert record.identity.noise == "exact-grid:256"
    for i, counts in enumerate(record.votes()["counts_estimation"]):
        known = dict(sigma=0.25, seed=0, purpose=Purpose.ESTIMATE, image_id=images.ids[i], grid=256)
        copies, failed = exact_noisy_copies(images[i], start=0, stop=130, **known)
        padded = torch.cat([copies, torch.zeros(70, 1, 8, 8)])
        with torch.inference_mode():
            logits = torch.cat([starter(padded[:100]), starter(padded[100:])])[:130]
        assert not failed.any() and counts.tolist() == count_votes_reference(logits).tolist()


def test_a_copy_that_failed_votes_for_nobody_whatever_the_classifier_says(digits, monkeypatch):
    def every_third_fails(image, *, start, stop, **_):
        failed = torch.arange(start, stop) % 3 == 0
        copies = image.expand(stop - start, -1, -1, -1).clone()
        copies[failed] = float("nan")
        return copies, failed

    monkeypatch.setattr(stream_module, "exact_noisy_copies", every_third_fails)
    smoothed = Smoothed(lambda x: x.flatten(1)[:, :10].nan_to_num(), 0.25)
    record = smoothed.sample(digits.take("first:2"), n0=9, n=300, alpha=0.01, noise="exact-grid", progress=False)
    assert [c.sum() for c in record.votes()["counts_estimation"]] == [200, 200]
    assert [c.sum() for c in record.votes()["counts_selection"]] == [6, 6]


def test_exact_noise_needs_a_grid(digits):
    images = data.from_arrays(digits.batch(0, 1) * 0.777, grid=None)
    with pytest.raises(ValueError, match="noise='exact-grid' needs data that declares a grid"):
        Smoothed(lambda x: x.flatten(1)[:, :10], 0.25).sample(images, n=100, noise="exact-grid")


def test_a_sigma_for_each_image(starter, digits):
    images, sigmas = digits.take("first:3"), [0.1, 0.5, 0.25]
    tasks = [Task(i, Purpose.ESTIMATE, 0, 150) for i in range(3)]
    together = [counts.tolist() for _, counts, _ in stream(starter, images, sigma=sigmas).run(tasks)]
    for i, sigma in enumerate(sigmas):
        (alone,) = stream(starter, images, sigma=sigma).run([tasks[i]])
        assert alone[1].tolist() == together[i]
    with pytest.raises(ValueError, match="sigma must be a finite number above 0"):
        stream(starter, images, sigma=[0.1, 0.0, 0.1])


def test_long_runs_load_the_kernels_and_count_the_same(starter, digits, monkeypatch):
    from smoothkit.kernels import noise

    monkeypatch.setattr(noise, "KERNEL_PIXELS", noise.KERNEL_PIXELS)
    settings = dict(n0=10, n=130, alpha=0.01, progress=False)
    plain = counts_of(Smoothed(starter, 0.25).sample(digits.take("first:2"), **settings))
    monkeypatch.setattr(stream_module, "KERNELS_AFTER", 0.0)
    assert counts_of(Smoothed(starter, 0.25).sample(digits.take("first:2"), **settings)) == plain
    assert noise.KERNEL_PIXELS == 1 and noise.backend(64) == "numba"


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(digits):
    largest = []

    def small(images):
        if len(images) > 30:
            raise torch.OutOfMemoryError("pretend")
        largest.append(len(images))
        return images.flatten(1)[:, :10]

    images = digits.take("first:3")
    with pytest.warns(UserWarning, match="out of memory: going on with a compute batch of 25"):
        results = list(stream(small, images, batch=100).run([Task(i, Purpose.ESTIMATE, 0, 90) for i in range(3)]))
    assert max(largest) == 25 and {batch for *_, batch in results} == {25}
    plain = list(
        stream(lambda x: x.flatten(1)[:, :10], images).run([Task(i, Purpose.ESTIMATE, 0, 90) for i in range(3)])
    )
    assert [c.tolist() for _, c, _ in results] == [c.tolist() for _, c, _ in plain]


def test_running_out_of_memory_in_the_middle(digits):
    calls = []

    def later(images):
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("pretend")
        return images.flatten(1)[:, :10]

    images, tasks = digits.take("first:5"), [Task(i, Purpose.ESTIMATE, 0, 90) for i in range(5)]
    with pytest.warns(UserWarning, match="compute batch of 50"):
        results = list(stream(later, images, batch=100).run(tasks))
    plain = list(stream(lambda x: x.flatten(1)[:, :10], images).run(tasks))
    assert [(t, c.tolist()) for t, c, _ in results] == [(t, c.tolist()) for t, c, _ in plain]
    assert 50 in {batch for *_, batch in results}


def test_out_of_memory_with_a_single_image(digits):
    def never(images):
        raise torch.OutOfMemoryError("pretend")

    with warnings.catch_warnings(), pytest.raises(MemoryError, match="with a single image"):
        warnings.simplefilter("ignore")
        stream(never, digits.take("first:1"), batch=4)


@pytest.mark.parametrize(
    ("base_classifier", "match"),
    [
        (lambda x: x, "must give float logits"),
        (lambda x: x.flatten(1).argmax(1), "must give float logits"),
        (lambda x: x.flatten(1)[:1], "must give float logits"),
        (lambda x: [1], "got list"),
        (lambda x: x.flatten(1) * float("nan"), "NaN or infinity for every logit"),
    ],
)
def test_base_classifiers_that_are_none(base_classifier, match, digits):
    with pytest.raises(ValueError, match=match):
        stream(base_classifier, digits.take("first:1"))


def test_a_random_base_classifier_is_pointed_out(digits):
    with pytest.warns(UserWarning, match=r"not deterministic: .* changed \d+ of 100 votes"):
        stream(lambda x: x.flatten(1)[:, :10] + torch.rand(len(x), 10), digits.take("first:1"))


def test_training_mode_is_left_and_given_back(digits):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 10)).train()
    network[0].eval()
    modes = []
    network.register_forward_hook(lambda module, *_: modes.append(module.training or module[1].training))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # dropout would be pointed out
        Smoothed(network, 0.25).sample(digits.take("first:1"), n0=10, n=20, alpha=0.05, progress=False)
    assert not any(modes) and network.training and network[1].training and not network[0].training


def test_labels_beyond_the_classes(digits):
    with pytest.raises(ValueError, match=r"label \d of image .* lies outside the base classifier's 2 classes"):
        Smoothed(lambda x: x.flatten(1)[:, :2], 0.25).sample(digits, n=20, alpha=0.01)


def test_another_image_under_the_same_name(digits, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = digits.take("first:2")
    settings = dict(sigma=0.25, stopping_rule=StoppingRule(10, 20, 0.01), progress=False, out=tmp_path / "r")
    collect_votes(network, images, **settings)
    import dataclasses

    changed = dataclasses.replace(images, read=lambda i: images.read(i) * 0.5)
    with pytest.raises(ValueError, match="its contents differ"):
        collect_votes(network, changed, **settings)


def test_record_on_disk_needs_a_name_for_a_plain_function(digits, tmp_path):
    def function(x):
        return x.flatten(1)[:, :10]

    smoothed = Smoothed(function, 0.25)
    with pytest.raises(ValueError, match="give model_id="):
        smoothed.sample(digits.take("first:1"), n=20, alpha=0.01, out=tmp_path / "r")
    named = Smoothed(function, 0.25, model_id="first-ten-pixels")
    record = named.sample(digits.take("first:1"), n=20, alpha=0.01, out=tmp_path / "r", progress=False)
    assert record.identity.fingerprint == "vouched:first-ten-pixels"
    with pytest.raises(RecordError, match="record of another run: this one has fingerprint"):
        Smoothed(function, 0.25, model_id="other").sample(digits.take("first:1"), n=20, alpha=0.01, out=tmp_path / "r")


def test_cost_is_said_before_a_long_run(digits, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "LONG_RUN", 0.0)
    Smoothed(lambda x: x.flatten(1)[:, :10], 0.25).sample(digits.take("first:2"), n=300)
    err = capsys.readouterr().err
    assert re.search(r"800 samples to draw for 2 images at about [\d,]+ a second on cpu: \d+ s", err)
    assert "votes at sigma 0.25" in err and "images/s" in err


def test_provenance_names_no_machine(starter, digits, tmp_path, monkeypatch):
    for asked in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(*asked, lambda: "machine-of-somebody")
    record = Smoothed(starter, 0.25).sample(
        digits.take("first:1"), n0=10, n=20, alpha=0.05, out=tmp_path / "r", progress=False
    )
    (about,) = record.provenance()
    assert about["compute_batch"] == 100 and about["torch"] == torch.__version__
    text = "".join(p.read_bytes().decode("latin1") for p in [*record.parts(), record.path / "run.json"])
    assert str(ROOT) not in text and str(tmp_path) not in text and "machine-of-somebody" not in text


@pytest.mark.slow
def test_without_triton_numba_and_a_compiler(tmp_path):
    """A process in which they cannot be imported or found certifies the same."""
    code = (
        "import sys\n"
        "sys.modules.update(triton=None, numba=None)  # importing them raises, looking for them finds nothing\n"
        "from smoothkit import Smoothed, data, models\n"
        "images = data.load('digits', subset='first:2')\n"
        "record = Smoothed(models.load('starter:digits-vit-0.25'), 0.25).sample(images, n=200, progress=False)\n"
        "print(record.votes()['counts_estimation'].map(list).tolist())\n"
    )
    environment = {**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent", "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    images = data.load("digits", subset="first:2")
    record = Smoothed(models.load("starter:digits-vit-0.25"), 0.25).sample(images, n=200, progress=False)
    expected = record.votes()["counts_estimation"].map(lambda c: c.tolist()).tolist()
    assert str(expected) in done.stdout.replace("np.int64(", "").replace(")", "")
