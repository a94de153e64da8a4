"""Denoisers of rows: from settings, trained, in front of a row's classifier."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from smoothbook.denoise import DenoisedClassifier, DiffusionDenoiser, DnCNN
from smoothbook.tables import Row, RowError, load_rows
from smoothbook.tables.build import build, check_row
from smoothbook.tables.denoisers import put_lora, read_denoiser
from smoothbook.tables.make import certify_row, train_row
from smoothkit import data
from smoothkit.models import fingerprint

CALIBRATED = {"calibration": {"brier": 1.0, "anti": 0.1}, "sigmas": [0.25, 0.5]}
QUICK = dict(epochs=1, batch=32, validation=0.0, n0=10, n=100)


def tiny(kind: str) -> UNet2DModel:
    """A UNet of two levels; `kind` is Attn where the second has attention, for LoRA, and empty where not."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", f"{kind}DownBlock2D"), up_block_types=(f"{kind}UpBlock2D", "UpBlock2D"),
        attention_head_dim=8, add_attention=bool(kind),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with attention."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny("Attn").save_pretrained(path / "unet")
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(path / "scheduler")
    return str(path)


@pytest.fixture(scope="module")
def few():
    return data.load("digits", split="train").take("first:64")


def row(**settings) -> Row:
    return Row(**{"name": "mine", "sigma": 0.25, "method": "denoiser", **QUICK, **settings})


def denoiser(settings: dict):
    return read_denoiser(settings, trained="calibration" in settings).make(0.25, channels=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("denoiser: {unet: x}", "must have one of the keys diffusion and dncnn, got ['unet']"),
        ("denoiser: {dncnn: {}, diffusion: x}", "must have one of the keys"),
        ("denoiser: {dncnn: {}, lora: 4}", "denoiser: unknown key 'lora'; there are dncnn, objective, mse"),
        (
            "denoiser: {dncnn: {}, objective: psnr}",
            "objective 'psnr' is unknown; choose one of mse, stability, classification",
        ),
        ("denoiser: {diffusion: x}", "with the key calibration"),
        ("denoiser: {dncnn: {deep: 3}}", "dncnn: unknown key 'deep'; did you mean 'depth'?"),
        (
            "denoiser: {diffusion: x, calibration: {brier: 1}, sigmas: [0.25, 1e-1]}",
            "sigmas[1] must be float, got '1e-1'; YAML",
        ),
        ("{method: clean, denoiser: {dncnn: {}}}", "a dncnn is trained: give the row the method denoiser"),
        ("{method: clean, denoiser: {diffusion: x, calibration: {brier: 1}}}", "with the key calibration, and not"),
        ("denoiser: {diffusion: x, calibration: {brier: -1}}", "brier must be at least 0"),
        ("denoiser: {diffusion: x, calibration: {brier: 1}}", "calibration needs sigmas"),
        ("method: denoiser", "needs a denoiser, as denoiser: {dncnn: {depth: 8}}"),
        ("{denoiser: {dncnn: {}}, keep: true}", "a row with a denoiser is not kept"),
    ],
)
def test_settings_that_make_no_denoiser_say_why(settings, message, tmp_path):
    path = tmp_path / "mine.yaml"
    settings = settings if settings.startswith("{") else "{" + settings + "}"
    path.write_text(
        f"defaults: {{method: denoiser, sigma: 0.25}}\nrows:\n- {{name: a, {settings.removeprefix('{').removesuffix('}')}}}\n"
    )
    with pytest.raises(RowError) as error:
        load_rows(path, check=check_row)
    assert message in str(error.value)


def test_lora_starts_at_the_model_and_is_all_that_is_trained(folder):
    plain = denoiser({"diffusion": folder})
    with_lora = denoiser({"diffusion": folder, "lora": 2, **CALIBRATED})
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(with_lora(images), plain(images), atol=1e-6, rtol=0)
    trained = [name for name, p in with_lora.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any(p.requires_grad for p in plain.parameters())
    again = denoiser({"diffusion": folder, "lora": 2, **CALIBRATED})
    assert fingerprint(again) == fingerprint(with_lora)
    with pytest.raises(ValueError, match="Target modules"):
        put_lora(tiny(""), rank=2)


@pytest.mark.parametrize("lora", [None, 2])
def test_one_calibration_serves_every_sigma(folder, few, lora, tmp_path):
    settings = {"diffusion": folder, **CALIBRATED} | ({} if lora is None else {"lora": lora})
    rows = [row(sigma=s, schedule="grid:0.25,0.5", denoiser=settings, lr=1e-2) for s in (0.25, 0.5)]
    assert rows[0].training_digest() == rows[1].training_digest()
    first = train_row(rows[0], few, out=tmp_path, progress=False)
    second = train_row(rows[1], few, out=tmp_path, progress=False)
    assert first.steps == second.steps == 2 and second.seconds == first.seconds  # read, not trained again
    assert [f.model.denoiser.step.t for f in (first, second)] == [145, 259]
    assert [int(f.model.denoiser.timesteps) for f in (first, second)] == [145, 259]
    for name, value in first.model.denoiser.unet.state_dict().items():
        assert torch.equal(value, second.model.denoiser.unet.state_dict()[name])
    start = denoiser(settings)
    assert fingerprint(first.model.denoiser) != fingerprint(start) and isinstance(first.model, DenoisedClassifier)
    assert fingerprint(first.model.classifier) == fingerprint(build(Row(name="c", sigma=0.25, method="clean")))


def test_a_trained_denoiser_is_certified_in_front_of_its_classifier(few):
    settings = {"dncnn": {"depth": 3, "width": 8}, "objective": "stability-after-mse", "mse": {"epochs": 2}}
    chosen = row(denoiser=settings)
    fitted = train_row(chosen, few, progress=False)
    assert isinstance(fitted.model.denoiser, DnCNN) and fitted.steps == 2 * 3
    record = certify_row(chosen, fitted.model, data.load("digits").take("first:2"), progress=False)
    assert (
        record.identity.fingerprint == fingerprint(fitted.model)
        and record.identity.model == "dncnn@0.25+starter:digits-vit-clean"
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_classifier_is_tuned_on_denoised_images(method, folder, few):
    settings = {"adapter": {"rank": 2}} if method == "lora" else {}
    fitted = train_row(row(method=method, denoiser={"diffusion": folder}, **settings), few, progress=False)
    assert isinstance(fitted.model.denoiser, DiffusionDenoiser)
    assert fingerprint(fitted.model.denoiser) == fingerprint(denoiser({"diffusion": folder}))
    whole = sum(p.numel() for p in fitted.model.classifier.parameters())
    assert fitted.trained.trained == whole if method == "full" else 0 < fitted.trained.trained < whole / 2


def test_settings_in_a_card_are_those_of_the_row(folder):
    settings = {"diffusion": folder, **CALIBRATED}
    a, b = row(denoiser=settings), row(denoiser=json.loads(json.dumps(settings)))
    assert a.made_like(b) and not a.made_like(row(denoiser={**settings, "noise": "schedule"}))
