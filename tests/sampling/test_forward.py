"""How a base classifier is run: the same logits by every road, and precision never by accident."""

import copy
import shutil
import warnings

import pytest
import torch
from torch import nn

from smoothkit import Smoothed, models
from smoothkit.records import RecordError, open_record
from smoothkit.sampling import forward
from smoothkit.sampling.forward import Forward, Road, prepare

CPU = torch.device("cpu")


def convolutional() -> models.BaseClassifier:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return models.wrap(network, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).eval()


def rows_for(made: Forward, images: torch.Tensor) -> torch.Tensor:
    """What the engine feeds: normalised where that was taken out, in the wanted type and layout."""
    if made.mean is not None:
        images = (images - made.mean.view(-1, 1, 1)) / made.std.view(-1, 1, 1)
    return made.empty_rows(len(images), tuple(images.shape[1:])).copy_(images)


def logits_of(made: Forward, images: torch.Tensor) -> torch.Tensor:
    with made.evaluating(), made.running():
        return made(rows_for(made, images))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_normalisation_taken_out_gives_the_same_logits(images, starter):
    classifier = convolutional()
    made = prepare(classifier, (3, 16, 16), device=CPU)
    assert made.mean.tolist() == pytest.approx([0.4, 0.5, 0.6]) and made.road == Road(channels_last=True)
    rows = rows_for(made, images)
    assert rows.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits_of(made, images), classifier(images), rtol=1e-5, atol=1e-6)
    grey = torch.rand(5, 1, 8, 8)
    made = prepare(starter, (1, 8, 8), device=CPU)
    assert made.road == Road() and str(made.road) == "eager"
    with torch.inference_mode():
        assert torch.equal(logits_of(made, grey), starter(grey))


def test_what_cannot_be_folded_is_not(images):
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    resized = models.wrap(network, size=(8, 8))
    resized(images)
    assert resized.fold((3, 16, 16)) is None and resized.fold((3, 8, 8)) is not None
    assert models.wrap(network, channels=3).fold((1, 8, 8)) is None
    hooked = models.wrap(network)
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0].clamp(0, 1),))
    assert hooked.fold((3, 8, 8)) is None

    class Clipped(models.BaseClassifier):
        def forward(self, x):
            return super().forward(x.clamp(0, 1))

    assert Clipped(network).fold((3, 8, 8)) is None
    made = prepare(resized, (3, 16, 16), device=CPU)
    assert made.mean is None
    torch.testing.assert_close(logits_of(made, images), resized(images))


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_bfloat16_casts_a_copy(images, size):
    classifier = convolutional()
    classifier.size = size
    before = copy.deepcopy(classifier.state_dict())
    made = prepare(classifier, (3, 16, 16), device=CPU, precision="bfloat16")
    assert made.dtype == (torch.float32 if size else torch.bfloat16)
    logits = logits_of(made, images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), classifier(images), rtol=0.05, atol=0.02)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in classifier.state_dict().items())


def test_bfloat16_of_a_plain_module(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    made = prepare(network, (3, 16, 16), device=CPU, precision="bfloat16")
    torch.testing.assert_close(logits_of(made, images).float(), network(images), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("precision", "change", "match"),
    [
        ("bf16", lambda m: m, "did you mean 'bfloat16'"),
        ("int8", lambda m: m, "must be one of float32, tf32, bfloat16, got 'int8'$"),
        ("tf32", lambda m: m, "property of NVIDIA GPUs, and this run is on cpu"),
        ("float32", nn.Module.double, "parameters are float64"),
        ("float32", nn.Module.bfloat16, "parameters are bfloat16, and precision is 'float32'; call .float"),
        ("float32", nn.Module.half, "parameters are float16"),
        ("bfloat16", lambda m: m.forward, "needs an nn.Module"),
    ],
)
def test_precisions_that_are_none(precision, change, match, digits):
    network = change(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match=match):
        Smoothed(network, 0.25, precision=precision, model_id="x").sample(digits.take("first:1"), n=20, alpha=0.01)


def test_precision_belongs_to_the_record(starter, digits, tmp_path):
    settings = dict(n0=10, n=20, alpha=0.05, out=tmp_path / "r", progress=False)
    record = Smoothed(starter, 0.25, precision="bfloat16").sample(digits.take("first:1"), **settings)
    assert open_record(record.path).identity.precision == "bfloat16"
    with pytest.raises(RecordError, match="precision"):
        Smoothed(starter, 0.25).sample(digits.take("first:1"), **settings)


def test_matrix_products_are_pinned_and_given_back(digits):
    seen = []

    def spy(images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return images.flatten(1)[:, :10]

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        Smoothed(spy, 0.25).sample(digits.take("first:1"), n=20, alpha=0.01, progress=False)
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) == {("highest", False)}
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert torch.backends.cudnn.allow_tf32 == before[1]


def test_prepared_once_for_the_same_weights():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    known = dict(device=CPU, batch=10)
    first = prepare(network, (1, 2, 2), fingerprint="a", **known)
    assert prepare(network, (1, 2, 2), fingerprint="a", **known) is first
    assert prepare(network, (1, 2, 2), fingerprint="b", **known) is not first, "trained in between"
    assert prepare(copy.deepcopy(network), (1, 2, 2), fingerprint="a", **known) is not first
    assert prepare(network, (1, 2, 2), fingerprint="a", device=CPU, batch=20) is not first
    assert prepare(network, (1, 2, 2), **known) is not first
    for i in range(forward.KEPT):
        prepare(network, (1, 2, 2), fingerprint=f"{i}", **known)
    assert len(forward._PREPARED) == forward.KEPT


def test_training_between_two_runs_changes_the_votes(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = dict(n0=10, n=100, alpha=0.05, progress=False)
    for precision in ("float32", "bfloat16"):
        smoothed = Smoothed(network, 0.25, precision=precision)
        one = smoothed.sample(digits.take("first:1"), **settings).votes()["counts_estimation"][0]
        with torch.no_grad():
            network[1].bias += torch.eye(10)[0] * 100
        other = smoothed.sample(digits.take("first:1"), **settings).votes()["counts_estimation"][0]
        assert other.tolist() == [100] + [0] * 9 != one.tolist()
        with torch.no_grad():
            network[1].bias -= torch.eye(10)[0] * 100


def test_a_network_that_cannot_be_compiled_goes_on(images, monkeypatch):
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler here\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = prepare(convolutional(), (3, 16, 16), device=CPU)
    with pytest.warns(UserWarning, match=r"compiling did not work \(no compiler here\); going on without"):
        made.compile(rows_for(made, images), keep_slower=True)
    assert not made.road.compiled


def test_a_compiled_network_that_is_wrong_is_left(images, monkeypatch):
    made = prepare(convolutional(), (3, 16, 16), device=CPU)
    plain = made._plain
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: f(x) * 1.1)
    with made.evaluating(), pytest.warns(UserWarning, match="logits 0.1 apart"):
        made.compile(rows_for(made, images), keep_slower=True)
    assert not made.road.compiled and made._call is plain


@pytest.mark.parametrize(
    ("faster", "keep_slower", "kept"),
    [(0.5, False, False), (forward.WORTH - 0.01, False, False), (forward.WORTH, False, True), (0.5, True, True)],
)
def test_a_compiled_network_is_kept_where_it_is_faster(images, monkeypatch, faster, keep_slower, kept):
    """By how much is measured, and no clock is a test: here it is given."""
    made = prepare(convolutional(), (3, 16, 16), device=CPU)
    made.samples_per_second = 100.0
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(forward, "how_much_faster", lambda *_: faster)
    with made.evaluating():
        made.compile(rows_for(made, images), keep_slower=keep_slower)
    assert made.road.compiled == kept and made.samples_per_second == (100 * faster if kept else 100)


def test_how_much_faster_is_the_median_of_rounds_in_turn():
    took = iter([3.0, 1.0, 100.0, 1.0, 4.0, 2.0])  # plain, other, plain, other, ...
    calls = []
    seconds = lambda call: (calls.append(call), next(took))[1]  # noqa: E731
    assert forward.how_much_faster(seconds, "plain", "other") == 3.0 and calls == ["plain", "other"] * 3


def test_compiling_is_tried_only_where_the_run_repays_it(digits, monkeypatch):
    from smoothkit.sampling import stream

    tried = []
    monkeypatch.setattr(Forward, "compile", lambda self, rows, **_: tried.append(len(rows)))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = dict(n0=10, n=200, alpha=0.05, progress=False)
    Smoothed(network, 0.25).sample(digits.take("first:2"), **settings)
    assert not tried
    monkeypatch.setattr(stream, "COMPILE_AFTER", 0.0)
    Smoothed(network, 0.25, compile=False).sample(digits.take("first:2"), **settings)
    assert not tried
    Smoothed(network, 0.25).sample(digits.take("first:2"), **settings)
    assert tried == [100]


def trouble_of_the_compiler(network: nn.Module) -> str:
    """What goes wrong where PyTorch compiles by itself: an error, or other logits (a cache of another machine does that)."""
    rows = torch.rand(100, 1, 8, 8)
    try:
        with torch.inference_mode():
            apart = float((torch.compile(network, dynamic=False)(rows) - network(rows)).abs().max())
    except Exception as error:
        return str(error).splitlines()[0]
    return f"logits {apart:.2g} apart" if apart > 1e-3 else ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_really_compiled(digits, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)).eval()
    settings = dict(n0=50, n=200, alpha=0.01, progress=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled = Smoothed(network, 0.25, compile=True).sample(digits.take("first:3"), out=tmp_path / "r", **settings)
    plain = Smoothed(network, 0.25, compile=False).sample(digits.take("first:3"), **settings)
    if {p["road"] for p in compiled.provenance()} != {"compiled"}:
        trouble = trouble_of_the_compiler(network)
        assert trouble, [str(warning.message) for warning in said]
        pytest.skip(f"torch.compile does not work here: {trouble}")
    difference = compiled.votes()["counts_estimation"] - plain.votes()["counts_estimation"]
    assert all(abs(d).sum() <= 2 for d in difference), "a last bit may move a vote, no more"
    # what was begun compiled goes on compiled, without being asked to
    again = Smoothed(network, 0.25).sample(digits.take("first:3"), out=tmp_path / "r", **settings)
    assert again.votes()["counts_estimation"].map(list).tolist() == (
        compiled.votes()["counts_estimation"].map(list).tolist()
    )
