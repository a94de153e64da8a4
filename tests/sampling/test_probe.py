"""The engine runs the classifier it was given, goes on with the one that began a record, and refuses one that looks about."""

import warnings

import pytest
import timm
import torch
from conftest import ROOT
from torch import nn

from smoothbook.adapters import bottleneck, lora
from smoothkit import Smoothed, data, models
from smoothkit.records import RecordError, open_record
from smoothkit.records.format import same_probe
from smoothkit.sampling import probe


@pytest.fixture
def base():
    return models.load("starter:digits-vit-0.25")


@pytest.fixture
def few(digits):
    return digits.take("first:6")


def answers(classifier, images) -> list[int]:
    with torch.no_grad():
        return classifier.eval()(images.batch()).argmax(1).tolist()


def certified(classifier, images, **how) -> list[int]:
    how = {"batch": 50, **how}
    found = Smoothed(classifier, 0.02, **how).certify(images, n=100, seed=1, progress=False)
    return [c.predicted for c in found]


def settings(base) -> dict:
    mean, std = (tuple(x.flatten().tolist()) for x in (base.mean, base.std))
    return dict(mean=mean, std=std, size=base.size, channels=base.channels)


class Inverted(models.BaseClassifier):
    """The network sees the negative."""

    def preprocess(self, images):
        return super().preprocess(1 - images)


class Reversed(models.BaseClassifier):
    """It answers the least likely class."""

    def forward(self, images):
        return -super().forward(images)


def hooked(base):
    changed = models.BaseClassifier(base.network, **settings(base))
    changed.register_forward_hook(lambda module, images, logits: -logits)
    return changed


def replaced(base):
    changed = models.BaseClassifier(base.network, **settings(base))
    changed.forward = lambda images: -models.BaseClassifier.forward(changed, images)
    return changed


CHANGED = {
    "preprocess overridden": lambda base: Inverted(base.network, **settings(base)),
    "forward overridden": lambda base: Reversed(base.network, **settings(base)),
    "hook": hooked,
    "forward replaced": replaced,
}


@pytest.mark.filterwarnings("ignore:this processor has no bfloat16")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGED)
def test_what_is_certified_is_what_the_module_answers(change, precision, base, few):
    changed = CHANGED[change](base)
    mine = answers(changed, few)
    assert mine != answers(base, few)
    said = certified(changed, few, precision=precision)
    assert all(c in (-1, truth) for c, truth in zip(said, mine, strict=True)) and said != [-1] * 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this processor has no bfloat16")
def test_no_prepared_copy_outlives_a_change_that_weights_do_not_show(base, few):
    """In bfloat16 a copy is cast; after another adapter is put to use, that copy is another classifier."""
    two = lora(base, rank=4, name="one").eval()
    two.add("two")
    with torch.no_grad():
        for name, value in two.named_parameters():
            if "head.modules_to_save.two" in name:
                value.zero_()
                if name.endswith("bias"):
                    value[3] = 50.0
    for adapter, expected in (("one", answers(base, few)), ("two", [3] * 6)):
        two.use(adapter)
        assert certified(two.eval(), few, precision="bfloat16") == expected


# --- identity is the function ------------------------------------------------------------------------


def filled(module, part: str, scale: float):
    with torch.no_grad():
        for name, value in module.named_parameters():
            if part in name:
                value.copy_(torch.linspace(-1, 1, value.numel()).reshape(value.shape) * scale)
    return module.eval()


class Threshold(nn.Module):
    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, images):
        above = images.flatten(1).sum(1) - self.at
        return torch.stack([above, -above], 1)


class Normalise(nn.Module):
    def __init__(self, mean, std) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)  # no buffers

    def forward(self, images):
        return (images - self.mean[:, None, None]) / self.std[:, None, None]


class Parts(nn.Module):
    """Sub-networks in a plain list, which a state dict does not know."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = [nn.Linear(64, 10)]

    def forward(self, images):
        return self.parts[0](images.flatten(1))


def heads(count: int):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=48,
        depth=2,
        num_classes=10,
        in_chans=1,
        num_heads=count,
    )
    return models.wrap(vit)


def used(base, name: str):
    two = lora(base, rank=4, name="one")
    two.add("two")
    filled(two, "lora_B.two", 2.0).use(name)
    return two.eval()


def normalised(mean: float):
    torch.manual_seed(0)
    return nn.Sequential(Normalise([mean], [1.0]), nn.Flatten(), nn.Linear(64, 10))


PAIRS = {
    "a plain number": lambda base: (Threshold(0.0), Threshold(40.0)),
    "tensors that are no buffers": lambda base: (normalised(0.0), normalised(0.9)),
    "a list of sub-networks": lambda base: (Parts(0), Parts(1)),
    "heads of attention": lambda base: (heads(3), heads(6)),
    "LoRA's alpha": lambda base: tuple(filled(lora(base, rank=4, alpha=a), "lora_B", 0.02) for a in (4.0, 400.0)),
    "the adapter in use": lambda base: (used(base, "one"), used(base, "two")),
    "the scale of a bottleneck": lambda base: tuple(
        filled(bottleneck(base, scale=s), ".up.weight", 0.05) for s in (1.0, 30.0)
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_record_is_not_gone_on_with_by_another_classifier(pair, base, few, tmp_path):
    first, other = PAIRS[pair](base)
    few = data.from_arrays(few.batch())
    assert models.fingerprint(first) == models.fingerprint(other), "structure and weights do not tell them apart"
    ask = dict(n=20, alpha=0.05, out=tmp_path / "record", progress=False)
    Smoothed(first, 0.25).sample(few, **ask)
    before = open_record(tmp_path / "record").votes()["counts_estimation"].map(list).tolist()
    with pytest.raises(RecordError, match="same structure and weights that answers otherwise"):
        Smoothed(other, 0.25).sample(few, **ask)
    again = Smoothed(first, 0.25).sample(few, **ask)  # the one that began it goes on
    assert again.votes()["counts_estimation"].map(list).tolist() == before


def test_records_of_earlier_versions_have_no_probe_and_agree_with_any():
    kept = open_record(ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25").identity
    assert kept.probe == "" and same_probe("", "1 2") and same_probe("1 2", "")
    assert same_probe("1 2 3", "1.0005 2 3") and not same_probe("1 2 3", "1.1 2 3") and not same_probe("1 2", "1 2 3")


def test_probes_are_the_same_for_equal_classifiers_and_empty_where_answers_do_not_repeat(base):
    one, again = (probe.ask(models.load("starter:digits-vit-0.25"), (1, 8, 8), torch.device("cpu")) for _ in range(2))
    assert one.text == again.text and one.digest == again.digest and len(one.text.split()) == 16
    drawn = probe.ask(lambda x: torch.rand(len(x), 3), (1, 8, 8), torch.device("cpu"))
    assert drawn.text == "" and not drawn.repeatable


# --- what a classifier may not do, and what it may -----------------------------------------------------


class BatchStatistics(nn.Module):
    """The votes of a batch are one vote: certified in two runs of five where p_A is one half."""

    def forward(self, images):
        middle = images.flatten(1).sum(1).mean() - images[0].numel() / 2
        return torch.stack([middle, -middle]).expand(len(images), 2)


@pytest.mark.parametrize(
    "network",
    [
        BatchStatistics(),
        nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 10)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(dim=0)),
    ],
    ids=["mean of the batch", "no running statistics", "softmax over the batch"],
)
def test_a_classifier_that_looks_at_its_batch_is_refused(network, few):
    with pytest.raises(ValueError, match="looks at its batch: with other rows beside it, the logits of a row moved"):
        Smoothed(network, 0.25).certify(few, n=100, progress=False)


@pytest.mark.parametrize("classifier", [nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), lambda x: x.flatten(1)[:, :1]])
def test_one_logit_is_refused(classifier, few):
    with pytest.raises(ValueError, match="one logit, so one class"):
        Smoothed(classifier, 0.25).certify(few, n=100, progress=False)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(64, 10)

    def forward(self, images):
        images.sub_(0.5).div_(0.2)
        return self.last(images.flatten(1))


def test_a_network_that_changes_its_input_in_place_is_given_a_copy(few):
    class Plain(InPlace):
        def forward(self, images):
            return self.last(((images - 0.5) / 0.2).flatten(1))

    ask = dict(n=200, seed=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changing = Smoothed(InPlace(), 0.25).certify(few, **ask)
    assert [c.n_a for c in changing] == [c.n_a for c in Smoothed(Plain(), 0.25).certify(few, **ask)]


class Views(nn.Module):
    """Six convolutions and a view, which another memory order does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)])
        self.last = nn.Linear(192, 10)

    def forward(self, images):
        images = self.body(images)
        return self.last(images.view(images.size(0), -1))


def test_a_memory_order_that_a_network_does_not_take_is_left():
    torch.manual_seed(0)
    images = data.from_arrays(torch.rand(2, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"does not run eager channels_last .*going on without"):
        (first, _) = Smoothed(Views(), 0.25).certify(images, n=100, progress=False)
    assert first.run.startswith("float32, batch 100, eager, ")


def test_a_certificate_says_how_the_classifier_was_run(base, few):
    one = Smoothed(base, 0.25, batch=7).certify(few.take("first:1"), n=100, progress=False)[0]
    assert one.run.startswith("float32, batch 7, eager, cpu") and f"as run: {one.run}" in one.sentence()
