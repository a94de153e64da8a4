"""Certifying adapters: pixel units, the rows of the table, the ensembles."""

import copy

import pytest
import timm
import torch
from torch import nn

from smoothbook import adapters
from smoothbook.adapters.certifying import CertifyingClassifier, NoiseEstimator, resnet, vit
from smoothbook.training import FitSettings, NoiseLevel, fit
from smoothkit import data, models

SMALL = dict(width=4, depth=1, stages=2)


def quick(**settings):
    return FitSettings(**{"batch": 64, "lr": 1e-2, "progress": False, "validation": None, **settings})


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:128")


@pytest.fixture(scope="module")
def members(base, images):
    made = {}
    for i, sigma in enumerate((0.25, 0.5)):
        member = adapters.certifying(base, adapter_settings=SMALL, seed=i)
        fit(member, images, quick(epochs=2, schedule=sigma))
        made[sigma] = member
    return made


@torch.no_grad()
def answers(model, images, stop=32):
    return model.eval()(images.batch(0, stop))


def test_adapter_of_the_released_code_has_its_size():
    """ResNet-18 with a last layer 512 -> 64: 11,201,664 parameters (papers/certifying-adapters.md, 2.1)."""
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet(3, 64).parameters()) == 11_201_664


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 50, 37)])
def test_builders_take_images_and_start_at_zero(shape):
    x = torch.rand(2, *shape)
    assert torch.equal(resnet(shape[0], 5, **SMALL)(x), torch.zeros(2, 5))
    if shape[1] == shape[2]:
        network = vit(shape[0], 5, image_size=shape[1], patch_size=4, width=8, depth=1, heads=2)
        assert torch.equal(network(x), torch.zeros(2, 5))


def test_sum_of_features_by_hand(base, members, images):
    model = members[0.25].eval()
    x = images.batch(0, 8)
    with torch.no_grad():
        normalised = (x - 0.3) / 0.4
        z = base.network.forward_head(base.network.forward_features(normalised), pre_logits=True)
        expected = model.network.head(z + model.network.adapter.network(normalised))
    assert torch.allclose(answers(model, images, 8), expected, atol=1e-5)
    norms = model.feature_norms(x)
    assert norms[0] == pytest.approx(float(z.norm(dim=1).mean()), rel=1e-5) and norms[1] > 0


def test_norms_may_be_watched_in_training(base, images):
    model, x = adapters.certifying(base, adapter_settings=SMALL), images.batch(0, 8)
    assert model.eval().feature_norms(x)[1] == 0 and not model.training  # the adapter starts at zero
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.feature_norms(x)
    assert model.training and model.network.adapter.training and not model.network.extractor.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_sigma_is_in_pixel_units(linear):
    """A half-space on pixels, through the whole wrapper with a normalisation of std 0.25: the noise that reaches the
    decision has standard deviation sigma, not sigma / std (fault 1 of the released code)."""
    w = torch.zeros(1, 64)
    w[0, 0] = 1.0
    network = nn.Sequential(nn.Flatten(), nn.Identity())
    network.add_module("head", nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        network.head.weight.copy_(torch.cat([-w, w]))
    plain = models.wrap(network, mean=(0.5,), std=(0.25,), channels=1)
    model = adapters.certifying(plain, adapter_settings=SMALL).eval()
    image, sigma = torch.full((1, 1, 8, 8), 0.5), 0.5
    image[0, 0, 0, 0] = 0.75  # half a sigma from the plane
    noise = sigma * torch.randn(20_000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        share = float((model(image + noise).argmax(1) == 1).float().mean())
    assert share == pytest.approx(0.6915, abs=5 * (0.6915 * 0.3085 / 20_000) ** 0.5)  # Phi(0.5), five standard errors


def test_rows_of_the_table(base, images):
    alone = adapters.certifying(base, adapter_settings=SMALL, use_features=False)
    head_only = adapters.certifying(base, use_adapter=False)
    assert adapters.trainable(head_only).parts == {"head.weight": 640, "head.bias": 10}
    assert not any("extractor" in name for name, _ in alone.named_parameters())
    assert torch.allclose(answers(head_only, images), answers(base, images), atol=1e-6)
    with pytest.raises(ValueError, match="only one of them"):
        alone.feature_norms(images.batch(0, 2))


def test_grey_images_on_a_colour_base_that_resizes(images):
    network = timm.create_model("test_vit", num_classes=10)  # three channels, 160 pixels
    colour = models.wrap(network, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=(160, 160), channels=3)
    model = adapters.certifying(colour, adapter_settings=SMALL)
    assert torch.allclose(answers(model, images, 2), colour.eval()(images.batch(0, 2)), atol=1e-5)


def test_a_module_of_ones_own(base, images, tmp_path):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64))

    model = adapters.certifying(base, adapter=make(), head="new", num_classes=3, class_names=("x", "y", "z"))
    assert answers(model, images).shape == (32, 3)
    model.save(tmp_path)
    with pytest.raises(ValueError, match="hand in the same one as adapter="):
        adapters.load(tmp_path, base)
    assert torch.equal(answers(adapters.load(tmp_path, base, adapter=make()), images), answers(model, images))


# --- ensembles -------------------------------------------------------------------------------------


def test_a_is_the_mean_of_logits(members, images):
    model = adapters.ensemble(members)
    expected = (answers(members[0.25], images) + answers(members[0.5], images)) / 2
    assert torch.allclose(answers(model, images), expected, atol=1e-5)
    assert adapters.trainable(model).trained == 0


def test_b_is_one_head_on_the_weighted_sum(members, images):
    model = adapters.ensemble(members, design="features").eval()
    x = images.batch(0, 8)
    with torch.no_grad():
        z, parts = model.network.extractor(x), [m.network.adapter.eval()(x) for m in members.values()]
        heads = [m.network.head for m in members.values()]
        weight, bias = (sum(getattr(h, n) for h in heads) / 2 for n in ("weight", "bias"))
        expected = (z + parts[0] / 2 + parts[1] / 2) @ weight.T + bias
    assert torch.allclose(answers(model, images, 8), expected, atol=1e-4)
    assert adapters.trainable(model).parts == {"weights": 2, "heads.*.weight": 640, "heads.*.bias": 10}


def test_c_starts_at_a_and_follows_its_estimator(members, images):
    model = adapters.ensemble(members, design="noise").eval()
    assert torch.allclose(answers(model, images), answers(adapters.ensemble(members), images), atol=1e-5)
    assert set(adapters.trainable(model).parts) == {
        f"estimator.{n}.{p}" for n in ("body.*", "head") for p in ("weight", "bias")
    }
    with torch.no_grad():
        model.network.estimator.head.bias.copy_(torch.tensor([0.0, 50.0]))
    assert torch.allclose(answers(model, images), answers(members[0.5], images), atol=1e-5)


def test_the_estimator_can_be_trained_by_itself(members, images):
    model = adapters.ensemble(members, design="noise")
    estimator = model.network.estimator
    assert isinstance(estimator, NoiseEstimator)
    done = fit(estimator, images, quick(loss=NoiseLevel((0.25, 0.5)), schedule="grid:0.25,0.5", epochs=25))
    assert done.history.accuracy.iloc[-1] > 0.85


@torch.no_grad()
def loss_under_noise(model, images):
    """Cross-entropy on one noisy copy of each image at each of two sigmas."""
    x, labels = images.batch(), torch.from_numpy(images.labels)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return float(sum(nn.functional.cross_entropy(model.eval()(x + sigma * z), labels) for sigma in (0.25, 0.5)))


@pytest.mark.parametrize("design", ["features", "noise"])
def test_ensembles_train_their_own_part_only_and_come_back(members, base, images, tmp_path, design):
    model = adapters.ensemble(members, design=design)
    before = copy.deepcopy(model.state_dict())
    given = {s: models.fingerprint(m) for s, m in members.items()}
    start = loss_under_noise(model, images)
    fit(model, images, quick(epochs=15, schedule="grid:0.25,0.5"))
    assert loss_under_noise(model, images) < start
    changed = {k.split(".")[1] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"weights", "heads"} if design == "features" else {"estimator"})
    assert {s: models.fingerprint(m) for s, m in members.items()} == given
    model.save(tmp_path)
    again = adapters.load(tmp_path, base)
    assert torch.equal(answers(again, images), answers(model, images))


def test_d_chooses_by_sigma_alone(members, base, images, tmp_path):
    choice = adapters.PerSigma(members)
    assert choice.at(0.25) is members[0.25] and choice.sigmas == (0.25, 0.5) and not callable(choice)
    with pytest.raises(ValueError, match=r"no adapter for sigma 1; there are 0\.25, 0\.5"):
        choice.at(1)
    choice.save(tmp_path)
    again = adapters.load(tmp_path, base)
    for sigma in (0.25, 0.5):
        assert isinstance(again.at(sigma), CertifyingClassifier)
        assert torch.equal(answers(again.at(sigma), images), answers(members[sigma], images))


def test_bad_settings(base, members):
    for make, message in [
        (lambda: adapters.certifying(base, adapter="resnet18"), "adapter must be one of resnet, vit or a module"),
        (lambda: adapters.certifying(base, use_features=False, use_adapter=False), "nothing would be left"),
        (lambda: adapters.certifying(base, num_classes=3), "needs head='new'"),
        (lambda: adapters.certifying(base, head="frozen"), "head must be base or new"),
        (lambda: resnet(1, 2, width=0), "width, depth and stages must be at least 1"),
        (lambda: adapters.ensemble(members, design="vote"), "design must be one of logits, features, noise"),
        (lambda: adapters.ensemble({0.25: members[0.25]}), "at least two members, got 1"),
        (
            lambda: adapters.ensemble({0.25: members[0.25], 0.5: base}),
            "member for sigma 0.5 must be a CertifyingClassifier",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    other = adapters.certifying(models.load("starter:digits-vit-0.25"), adapter_settings=SMALL)
    with pytest.raises(ValueError, match="must share one base"):
        adapters.ensemble({0.25: members[0.25], 0.5: other})
    unsaid = models.wrap(copy.deepcopy(base.network))
    with pytest.raises(ValueError, match="give channels="):
        adapters.certifying(unsaid)
