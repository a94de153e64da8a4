"""Bad input to training and adapters that no test of one module covers: clear errors, and nothing is lost."""

import dataclasses
import shutil

import pytest
import timm
import torch

from smoothbook import adapters
from smoothbook.training import SPSA, FitSettings, GradientFreeSettings, TrainingDiverged, fit, fit_gradient_free
from smoothbook.training.checkpoint import read_checkpoint
from smoothkit import Smoothed, data, models
from smoothkit.certify import certificates
from smoothkit.records import open_record
from smoothkit.sampling import stream as votes


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:64")


def test_lora_on_a_network_without_its_targets_lists_what_there_is():
    with pytest.raises(ValueError, match="targets='blocks' matches no layer of CifarResNet") as error:
        adapters.lora(models.load("resnet20_cifar", pretrained=False))
    assert "or a regular expression that fully matches some of: conv1, layer1.*.conv1 (3)" in str(error.value)
    with pytest.raises(ValueError, match="targets='convolutions' matches no layer of Sequential"):
        adapters.lora(models.wrap(torch.nn.Sequential(torch.nn.Flatten())), targets="convolutions", head="frozen")


@pytest.mark.parametrize("make", [adapters.prompts, adapters.bottleneck])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atto", "need a timm VisionTransformer, got ConvNeXt, which has no such blocks; use LoRA"),
        ("deit_tiny_distilled_patch16_224", "cannot find the head of VisionTransformerDistilled"),
    ],
)
def test_networks_that_only_look_alike(make, name, message):
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        make(models.wrap(network))


def test_weights_of_another_architecture(tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(data.data_dir() / "starters" / "digits-vit-clean", folder)
    config = (folder / "config.json").read_text()
    assert '"depth": 4' in config
    (folder / "config.json").write_text(config.replace('"embed_dim": 64', '"embed_dim": 32'))
    with pytest.raises(ValueError, match=r"the weights do not fit the architecture \(size mismatch"):
        models.load(f"local-dir:{folder}")


def test_a_checkpoint_of_another_model_is_refused_and_stays(base, images, tmp_path):
    settings = FitSettings(epochs=1, batch=32, validation=None, progress=False, out=tmp_path)
    resumed = dataclasses.replace(settings, resume=True)
    fit(adapters.lora(base, rank=2), images, settings)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    other = adapters.lora(base, rank=4)
    with pytest.raises(ValueError, match=r"is of another run: trained was \{.*\}, now \{"):
        fit(other, images, resumed)
    with pytest.raises(ValueError, match=r"is of another run: frozen was '.*', now '"):
        fit(adapters.lora(models.load("starter:digits-vit-0.25"), rank=2), images, resumed)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    again = fit(adapters.lora(base, rank=2), images, resumed)
    assert again.steps == 2


def test_a_box_that_fails_while_certified_keeps_its_votes(base, tmp_path, monkeypatch):
    """Counts reach the record every second, here after every task; the same call goes on from there."""
    monkeypatch.setattr(votes, "FLUSH_TASKS", 1)
    test, fails_at, asked = data.load("digits", subset="first:3"), None, []

    def service(x):
        asked.append(len(x))
        if len(asked) == fails_at:
            raise ConnectionError("no route")
        return base(x)

    def certify(**out):
        made = adapters.coordinator(service, base, image_shape=(1, 8, 8), cube=20, model_id="a service")
        return Smoothed(made, 0.25, batch=100).sample(test, n0=100, n=200, progress=False, **out)

    whole = certify()
    calls, fails_at = len(asked), 2 * len(asked) - 2  # the probes, and all but the last batches
    with pytest.raises(adapters.BlackBoxError, match=r"raised ConnectionError \(no route\).*answered queries"):
        certify(out=tmp_path / "votes")
    kept = len(open_record(tmp_path / "votes").rows())
    assert 0 < kept < len(whole.rows())
    before = len(asked)
    record = certify(out=tmp_path / "votes")
    assert len(asked) - before < calls
    assert certificates(record).equals(certificates(whole))


@pytest.mark.parametrize("per", ["weights", "images"])
def test_a_box_that_turns_to_nan_stops_and_the_last_checkpoint_goes_on(base, images, tmp_path, per):
    asked, bad = [], True

    def box(x):
        asked.append(len(x))
        return base(x) * (float("nan") if bad and len(asked) > 6 else 1.0)

    def fresh():
        return adapters.coordinator(box, base, image_shape=(1, 8, 8), cube=20, model_id="ill")

    settings = GradientFreeSettings(
        steps=6, batch=32, spsa=SPSA(per=per, repeats=1), report_every=2, progress=False, out=tmp_path, resume=True
    )
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 4, after 224 queries"):
        fit_gradient_free(fresh(), images, settings)
    bad = False
    learned = fit_gradient_free(fresh(), images, settings)
    assert [row["step"] for row in learned.rows] == [2, 4, 6]
    assert learned.model.queries == 2 * 6 * 32  # the steps after the checkpoint are asked again, and counted once


def test_answers_that_change_their_kind_in_training(base, images, tmp_path):
    """A service that begins to send probabilities: said at once, the steps before are kept."""
    asked = []

    def box(x):
        asked.append(len(x))
        return base(x) if len(asked) < 4 else base(x).softmax(1)

    model = adapters.coordinator(box, base, image_shape=(1, 8, 8), cube=20, model_id="updated")
    settings = GradientFreeSettings(steps=4, batch=32, spsa=SPSA(repeats=1), progress=False, out=tmp_path)
    with pytest.raises(adapters.BlackBoxError, match="seems to return probabilities"):
        fit_gradient_free(model, images, settings)
    assert read_checkpoint(tmp_path)["step"] == 1
