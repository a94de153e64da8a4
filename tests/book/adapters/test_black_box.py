"""The coordinator in front of a black box, and what a black box may answer."""

import pytest
import torch
from torch import nn

from smoothbook import adapters
from smoothbook.adapters.black_box import Decoder
from smoothkit import data, models


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:64").batch()


def made(base, box=None, **settings):
    settings = {"image_shape": (1, 8, 8), **settings}
    return adapters.coordinator(base if box is None else box, base, **settings)


def test_decoder_of_blackvip_has_its_size():
    """9,120 parameters and a trigger of 800 for 224 pixels and 768 features (papers/peftsmoothing.md, 2.5)."""
    decoder = Decoder(768, (3, 224, 224), cube=32, widths=None)
    assert decoder.trigger.numel() == 800 and sum(p.numel() for p in decoder.body.parameters()) == 9_120
    assert bool(((decoder.trigger >= 0) & (decoder.trigger <= 0.1)).all())
    assert decoder.eval()(torch.randn(2, 768)).shape == (2, 3, 224, 224)


@pytest.mark.parametrize("shape, cube", [((1, 8, 8), 16), ((3, 32, 32), 8), ((3, 64, 32), 4), ((1, 28, 28), 8)])
def test_decoder_makes_images_of_any_even_size(shape, cube):
    assert Decoder(40, shape, cube=cube, widths=None)(torch.randn(3, 40)).shape == (3, *shape)
    assert Decoder(8, shape, cube=cube, widths=(6,))(torch.randn(3, 8)).shape == (3, *shape)


def test_starts_at_the_clipped_base_and_follows_its_formula(base, images):
    model = made(base).eval()
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(noisy), base(noisy.clamp(0, 1)), atol=1e-6)
        nn.init.normal_(model.network.decoder.body[-1].weight)
        h = model.network.decoder(model.network.encoder(noisy))
        assert torch.allclose(model(noisy), base((noisy + 0.5 * h).clamp(0, 1)), atol=1e-5)
    assert set(adapters.trainable(model).parts) >= {"decoder.trigger"}
    assert all(part.startswith("decoder.") for part in adapters.trainable(model).parts)


def test_queries_are_counted_and_weights_of_the_box_are_not_ours(base, images):
    model = made(base)
    assert model.queries == 0
    model.eval()(images)
    model(images[:10])
    assert (model.queries, model.box.calls) == (74, 2)
    assert not any("box" in name for name in model.state_dict())


def test_any_callable_and_probabilities(base, images):
    remote = lambda x: base(x).softmax(1)  # noqa: E731
    model = made(base, remote, returns="probabilities", model_id="remote-1").eval()
    with torch.no_grad():
        assert torch.allclose(model(images).softmax(1), base(images).softmax(1), atol=1e-5)
    assert model.name == "remote-1+coordinator"
    with pytest.raises(ValueError, match="give model_id="):
        made(base, remote)


def test_saves_and_loads_for_its_own_box_only(base, images, tmp_path):
    model = made(base, cube=20)
    with torch.no_grad():
        nn.init.normal_(model.network.decoder.body[-1].weight)
        model.train()(images)  # moves the statistics of its BatchNorm, if any
    model.save(tmp_path)
    again = adapters.load(tmp_path, base, box=base)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))
    assert models.fingerprint(again) == models.fingerprint(model)
    other = models.load("starter:digits-vit-0.25")
    assert models.fingerprint(made(base, other, cube=20)) != models.fingerprint(made(base, cube=20))
    for box, encoder in ((other, base), (base, other)):
        with pytest.raises(ValueError, match="belongs to"):
            adapters.load(tmp_path, encoder, box=box)
    with pytest.raises(ValueError, match="give box=, the black box"):
        adapters.load(tmp_path, base)


def test_an_encoder_of_ones_own(base, images):
    model = adapters.coordinator(base, nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), image_shape=(1, 8, 8), cube=2)
    assert model(images).shape == (64, 10)
    assert not any("encoder" in part for part in adapters.trainable(model).parts)


@pytest.mark.parametrize("sees, numbers", [("pixels", 64), ("both", 64 + 64)])
def test_a_decoder_that_sees_the_image(base, images, sees, numbers, tmp_path):
    model = made(base, sees=sees, cube=40)
    assert model.network.encoded(images).shape == (64, numbers)
    assert torch.equal(model.network.encoded(images)[:, -64:], images.flatten(1))
    assert model.network.decoder.trigger.numel() == 40 * 4 - numbers
    with torch.no_grad():
        nn.init.normal_(model.network.decoder.body[-1].weight)
        again = adapters.load(model.save(tmp_path), base, box=base)
        assert torch.equal(again.eval()(images), model.eval()(images))
    assert all(part.startswith("decoder.") for part in adapters.trainable(model).parts)


def test_a_large_image_is_shrunk_for_the_decoder():
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = adapters.coordinator(
        lambda x: x.mean((2, 3)), encoder, image_shape=(3, 32, 32), sees="both", cube=16, model_id="means"
    )
    assert model.network.encoded(torch.rand(2, 3, 32, 32)).shape == (2, 3 + 3 * 64)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda x: x.flatten(1).softmax(1), "seems to return probabilities .* give returns='probabilities'"),
        (
            lambda x: x.flatten(1).argmax(1),
            r"must return floats \[64, num_classes\], logits or probabilities; got \(64,\) torch.int64",
        ),
        (lambda x: x.flatten(1)[:3], r"must return floats \[64, num_classes\].*got \(3, 64\)"),
        (lambda x: x.flatten(1).tolist(), "got list"),
        (
            lambda x: 1 / 0,
            r"raised ZeroDivisionError \(division by zero\) on images of shape \(64, 1, 8, 8\), after 0 answered",
        ),
    ],
)
def test_answers_that_cannot_be_used(base, images, answer, message):
    model = made(base, answer, model_id="odd").eval()
    with pytest.raises(adapters.BlackBoxError, match=message):
        model(images)


def test_logits_said_to_be_probabilities(base, images):
    with pytest.raises(adapters.BlackBoxError, match="was said to return probabilities, but its rows"):
        made(base, returns="probabilities").eval()(images)


def test_bad_settings(base):
    for settings, message in [
        (dict(strength=0), "strength must be above 0"),
        (dict(sees="everything"), "sees must be one of features, pixels, both, got 'everything'"),
        (dict(cube=16), r"cube=16 gives 64 numbers of 2x2, no room for the encoder's 64 and a trigger; give cube=17"),
        (dict(image_shape=(1, 7, 7)), "divisible by 2"),
        (dict(returns="labels"), "returns must be logits or probabilities"),
        (dict(box=3), "must be callable"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(base, **settings)
    with pytest.raises(ValueError, match=r"encoder must give vectors \[B, dim\]"):
        adapters.coordinator(base, nn.Identity(), image_shape=(1, 8, 8))
