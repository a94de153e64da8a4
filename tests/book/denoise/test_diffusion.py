"""One-shot diffusion denoising: scales, timesteps, heads, loading, and the engine around it."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from smoothbook.denoise import (
    DenoisedClassifier,
    Denoiser,
    DiffusionDenoiser,
    Identity,
    alphas_bar_of,
    load_diffusion,
    psnr,
    schedule_sigmas,
    timestep_for,
)
from smoothbook.denoise import diffusion as diffusion_module
from smoothkit import Purpose, Smoothed, data, models, noisy_copies
from smoothkit.certify import cascade_certificates, certificates

LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Model(nn.Module):
    """A diffusion model made of a function (x_t, t) -> output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, timesteps):
        return self.function(x, timesteps)


def denoiser(function, sigma=0.25, **settings) -> DiffusionDenoiser:
    return DiffusionDenoiser(Model(function), LINEAR, sigma=sigma, **settings)


# --- the schedule ----------------------------------------------------------------------------------------

# first t with sqrt((1 - abar) / abar) / 2 >= sigma, and that value, in float64
TABLE = {
    "linear 1000": {0.12: (70, 0.120689), 0.25: (145, 0.251581), 0.5: (259, 0.502392), 0.75: (339, 0.753276), 1.0: (396, 1.000241)},
    "cosine 4000": {0.12: (573, 0.120116), 0.25: (1158, 0.250119), 0.5: (1984, 0.500312), 0.75: (2490, 0.750115), 1.0: (2809, 1.000014)},
    "cosine 1000": {0.12: (143, 0.120528), 0.25: (289, 0.250362), 0.5: (496, 0.501483), 0.75: (622, 0.750749), 1.0: (702, 1.001965)},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_sigma_to_timestep(name):
    from diffusers import DDPMScheduler

    kind, steps = name.split()
    betas = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear" if kind == "linear" else "squaredcos_cap_v2")
    alphas_bar = alphas_bar_of(DDPMScheduler(num_train_timesteps=int(steps), **betas))
    assert (np.diff(schedule_sigmas(alphas_bar)) > 0).all()
    for sigma, (t, level) in TABLE[name].items():
        step = timestep_for(alphas_bar, sigma)
        assert step.t == t and step.sigma == pytest.approx(level, abs=6e-7)
        assert step.alpha_bar == pytest.approx(1 / (1 + 4 * step.sigma**2))
        # the other rule: the first t with sqrt(abar) <= sqrt(1 / (1 + (2 sigma)^2))
        assert t == int((np.sqrt(alphas_bar) <= math.sqrt(1 / (1 + 4 * sigma**2))).argmax())


def test_a_schedule_that_does_not_reach_sigma_says_how_far_it_does():
    short = LINEAR[:300]  # as a model trained on part of the way
    largest = schedule_sigmas(short)[-1]
    assert timestep_for(short, largest).t == 299
    with pytest.raises(
        ValueError, match=rf"reaches sigma {math.floor(largest * 1e4) / 1e4:g} \(pixel units\) at most, got 1;"
    ):
        timestep_for(short, 1.0)
    assert timestep_for(LINEAR, 0.001).t == 0


# --- exact values ----------------------------------------------------------------------------------------


def noisy_and_noise(sigma, shape=(4, 3, 8, 8)):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    return images, noise, images + sigma * noise


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_model_that_knows_the_truth_gives_the_clean_image(sigma, prediction):
    """At the level of the schedule each head, told the truth, must give back the image; this pins every scale factor."""
    step = timestep_for(LINEAR, sigma)
    images, noise, noisy = noisy_and_noise(step.sigma)  # the convention of Carlini et al.
    z, keep, spread = 2 * images - 1, math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
    seen = {}

    def oracle(x, t):
        seen.update(x=x, t=t)
        return {"epsilon": noise, "sample": z, "v_prediction": keep * noise - spread * z}[prediction]

    clean = denoiser(oracle, sigma, prediction=prediction, noise="schedule")(noisy)
    torch.testing.assert_close(clean, images, atol=2e-6, rtol=0)
    torch.testing.assert_close(seen["x"], keep * z + spread * noise, atol=3e-6, rtol=0)
    assert int(seen["t"]) == step.t


@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0])
def test_a_gaussian_prior_gives_its_closed_form(sigma):
    """A model that is the posterior mean under N(mu, C), as an epsilon model: the path must return that mean."""
    generator = torch.Generator().manual_seed(0)
    size = 64
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
    mu = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)

    def posterior_mean(y, s):  # of z given y = z + s g
        return mu + (y - mu) @ vectors * (values / (values + s**2)) @ vectors.T

    def epsilon(x, t):
        alpha_bar = LINEAR[int(t)]
        s = math.sqrt((1 - alpha_bar) / alpha_bar)
        flat = x.flatten(1)
        clean = posterior_mean(flat / math.sqrt(alpha_bar), s)
        return ((flat - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)).reshape(x.shape)

    images = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    noisy = images + sigma * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    found = denoiser(epsilon, sigma, clamp="none")(noisy)
    expected = (posterior_mean((2 * noisy - 1).flatten(1), 2 * timestep_for(LINEAR, sigma).sigma) + 1) / 2
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-6, rtol=0)


def test_noise_conventions():
    exact, schedule = (denoiser(lambda x, t: x, 0.25, noise=n) for n in ("exact", "schedule"))
    assert exact.noise_sigma == 0.25 and schedule.noise_sigma == pytest.approx(0.251581, abs=1e-6)
    assert exact.step == schedule.step and exact.std == schedule.std  # told the same, only the noise differs
    with pytest.raises(ValueError, match="noise must be one of exact, schedule, got 'nominal'"):
        denoiser(lambda x, t: x, noise="nominal")


def test_learned_variance_is_left_out():
    images, noise, noisy = noisy_and_noise(timestep_for(LINEAR, 0.5).sigma)
    wide = denoiser(lambda x, t: torch.cat([noise, torch.full_like(noise, torch.nan)], dim=1), 0.5)
    torch.testing.assert_close(wide(noisy), images, atol=2e-6, rtol=0)


def test_clamping_and_its_gradient():
    images = torch.full((1, 1, 2, 2), 0.9)
    for clamp, value, slope in [("hard", 1.0, 0.0), ("straight-through", 1.0, 1.0), ("none", 1.5, 1.0)]:
        point = images.clone().requires_grad_()
        bright = denoiser(lambda x, t: x * 0 + 2 + (x - x.detach()), prediction="sample", clamp=clamp)
        out = bright(point)
        out.sum().backward()
        assert (out == value).all() and bool((point.grad != 0).all()) == bool(slope)


def test_several_steps_follow_a_straight_path():
    """A model that always knows the image gives it after any number of calls, at falling timesteps."""
    images, _, noisy = noisy_and_noise(0.5)
    asked = []

    def knows(x, t):
        asked.append(int(t))
        return 2 * images - 1

    found = denoiser(knows, 0.5, prediction="sample", steps=4)(noisy)
    torch.testing.assert_close(found, images, atol=1e-6, rtol=0)
    assert asked == [259, 194, 130, 65]
    with pytest.raises(ValueError, match="steps must lie between 1 and 146"):
        denoiser(knows, 0.25, steps=147)


def test_padding_is_cropped_away(tmp_path):
    unet, _ = tiny(channels=3)
    model = DiffusionDenoiser(unet, LINEAR, sigma=0.25).eval()
    with torch.no_grad():
        odd = torch.rand(2, 3, 7, 9)
        assert model(odd).shape == odd.shape
        whole = torch.rand(2, 3, 6, 6)
        padded = DiffusionDenoiser(unet, LINEAR, sigma=0.25, pad_to=8).eval()
        by_hand = model(torch.nn.functional.pad(whole, (1, 1, 1, 1), mode="reflect"))[..., 1:-1, 1:-1]
        torch.testing.assert_close(padded(whole), by_hand)
        with pytest.raises(ValueError, match=r"multiples of 2; \(1, 8\) is too small to be padded"):
            model(torch.rand(1, 3, 1, 8))
        with pytest.raises(ValueError, match=r"denoises images of 3 channels, got shape \(1, 1, 8, 8\)"):
            model(torch.rand(1, 1, 8, 8))


def test_psnr():
    clean = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(psnr(clean + 0.1, clean), torch.full((2,), 20.0, dtype=torch.float64), atol=1e-4, rtol=0)


# --- diffusers pipelines ---------------------------------------------------------------------------------


def tiny(channels=1, out=None, **settings):
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out or channels, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        **settings,
    )  # fmt: skip
    return unet, DDPMScheduler(num_train_timesteps=1000)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Both layouts, with a network that tells timesteps and channels apart."""
    root = tmp_path_factory.mktemp("pipelines")
    unet, scheduler = tiny(out=2)
    unet.save_pretrained(root / "parts" / "unet")
    scheduler.save_pretrained(root / "parts" / "scheduler")
    unet.save_pretrained(root / "flat")
    scheduler.save_pretrained(root / "flat")
    return root


def copied(pipeline, tmp_path, layout="parts"):
    import shutil

    return shutil.copytree(pipeline / layout, tmp_path / "copy")


def test_both_layouts_are_read(pipeline, monkeypatch):
    images = torch.rand(2, 1, 8, 8)
    found = [load_diffusion(pipeline / layout, sigma=0.25) for layout in ("parts", "flat")]
    assert found[0].name == "parts@0.25" and found[0].prediction == "epsilon" and found[0].step.t == 145
    assert not any(p.requires_grad for p in found[0].parameters()) and not found[0].training
    with torch.no_grad():
        assert torch.equal(found[0](images), found[1](images))
        # Carlini et al., from the model's own answer
        x = math.sqrt(found[0].step.alpha_bar) * (2 * images - 1)
        noise = found[0].unet(x, 145).sample[:, :1]
        clean = (x - math.sqrt(1 - found[0].step.alpha_bar) * noise) / math.sqrt(found[0].step.alpha_bar)
        torch.testing.assert_close(found[0](images), (clean.clamp(-1, 1) + 1) / 2, atol=1e-5, rtol=0)
        other = found[0].at(0.5)
        assert other.unet is found[0].unet and other.step.t == 259 and other.name == "parts@0.5"
    fetched = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **how: fetched.append(name) or pipeline / "flat"
    )
    assert load_diffusion("google/ddpm-cifar10-32", sigma=0.25).name == "ddpm-cifar10-32@0.25"
    assert fetched == ["google/ddpm-cifar10-32"]


def test_hub_out_of_reach(monkeypatch):
    def offline(*_, **__):
        raise OSError("cannot find the repository locally")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"ddpm-cifar10-32 is not at hand .* connect to the network once, set HF_HOME"
    ):
        load_diffusion("google/ddpm-cifar10-32", sigma=0.25)


def test_missing_parts_are_named(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks scheduler/scheduler_config\.json$"):
        load_diffusion(folder, sigma=0.25)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds a pickle \(diffusion_pytorch_model\.bin\).*convert it once"):
        load_diffusion(folder, sigma=0.25)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks scheduler/.* and unet/diffusion_pytorch_model\.safetensors"):
        load_diffusion(folder, sigma=0.25)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks unet/config\.json and scheduler/scheduler_config\.json"):
        load_diffusion(folder, sigma=0.25)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; give a diffusers pipeline folder"):
        load_diffusion(tmp_path / "nowhere", sigma=0.25)
    with pytest.raises(FileNotFoundError, match="no starter 'nothing'"):
        load_diffusion("starter:nothing", sigma=0.25)


def rewritten(folder, file, **changes):
    at = folder / file
    at.write_text(json.dumps({**json.loads(at.read_text()), **changes}))
    return folder


def test_other_models_are_refused(pipeline, tmp_path):
    folder = rewritten(copied(pipeline, tmp_path), "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel; only unconditional pixel models"):
        load_diffusion(folder, sigma=0.25)
    with pytest.raises(ValueError, match="class-conditional: it wants the class that is to be found out"):
        DiffusionDenoiser(tiny(num_class_embeds=10)[0], LINEAR, sigma=0.25)
    with pytest.raises(ValueError, match="takes 1 channels and gives 3; 1 are wanted, or 2 with a learned variance"):
        DiffusionDenoiser(tiny(out=3)[0], LINEAR, sigma=0.25)
    at = folder / "scheduler" / "scheduler_config.json"
    at.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    rewritten(folder, "unet/config.json", _class_name="UNet2DModel")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, which has no betas"):
        load_diffusion(folder, sigma=0.25)
    at.write_text(json.dumps({"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "flow"}))
    with pytest.raises(ValueError, match="predicts 'flow'; known are epsilon, sample, v_prediction"):
        load_diffusion(folder, sigma=0.25)


def test_a_card_that_describes_another_file_is_noticed(pipeline, tmp_path, monkeypatch):
    import hashlib

    (tmp_path / "starters").mkdir()
    folder = copied(pipeline, tmp_path / "starters")
    monkeypatch.setattr(diffusion_module, "data_dir", lambda: tmp_path)
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "card.json").write_text(json.dumps({"sha256": hashlib.sha256(weights).hexdigest()}))
    assert load_diffusion("starter:copy", sigma=0.25).name == "copy@0.25"
    (folder / "card.json").write_text(json.dumps({"sha256": "0"}))
    with pytest.raises(ValueError, match="is not the file its card describes"):
        load_diffusion("starter:copy", sigma=0.25)


# --- through the engine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean():
    return models.load("starter:digits-vit-clean")


def rows_of(base, images, sigma=0.25, n=200, **settings):
    return Smoothed(base, sigma).sample(images, n=n, n0=20, seed=1, progress=False, **settings)


def test_the_identity_denoiser_reproduces_cohen_vote_for_vote(digits, starter):
    images = digits.take("first:6")
    cohen, chained = rows_of(starter, images), rows_of(DenoisedClassifier(Identity(), starter), images)
    assert cohen.rows()["counts"].tolist() == chained.rows()["counts"].tolist()
    a, b = certificates(cohen), certificates(chained)
    assert (a["radius"] == b["radius"]).all() and (a["predict"] == b["predict"]).all()
    one_scale = cascade_certificates([chained])
    assert (one_scale["radius"] == a["radius"]).all() and (one_scale["predict"] == a["predict"]).all()


def test_a_diffusion_model_without_effect_reproduces_cohen_vote_for_vote(digits, starter):
    """Through all scales and back: a model that sees no noise leaves x_t / sqrt(abar), the noisy image."""
    images = digits.take("first:4")
    through = denoiser(lambda x, t: torch.zeros_like(x), 0.25, clamp="none")
    votes = rows_of(DenoisedClassifier(through, starter), images).rows()["counts"]
    assert votes.tolist() == rows_of(starter, images).rows()["counts"].tolist()


def test_the_scaling_is_folded_into_the_noise(digits, starter):
    """What the engine computes is the module's own forward pass on noisy copies."""
    from smoothkit.sampling.batches import Task
    from smoothkit.sampling.stream import VoteStream

    base = DenoisedClassifier(DiffusionDenoiser(tiny()[0], LINEAR, sigma=0.25), starter).eval()
    assert base.fold((1, 8, 8)) is not None and base.sigma == 0.25 and base.class_names == starter.class_names
    image, ids = digits[0], digits.ids[0]
    where = dict(seed=5, purpose=Purpose.ESTIMATE, image_id=ids, start=0, stop=100)
    with torch.inference_mode():
        noisy = noisy_copies(image, sigma=0.25, grid=256, **where)
        logits = base(noisy)
        torch.testing.assert_close(base.classifier(base.denoise(noisy)), logits, atol=1e-4, rtol=1e-4)
    stream = VoteStream(base, digits.take("first:1"), sigma=0.25, seed=5)
    ((_, counts, _),) = stream.run([Task(0, Purpose.ESTIMATE, 0, 100)])
    assert counts.tolist() == torch.bincount(logits.argmax(1), minlength=10).tolist()


def test_other_precision_and_other_sigma_are_other_models(digits, starter):
    half = DenoisedClassifier(DiffusionDenoiser(tiny()[0], LINEAR, sigma=0.25), starter).eval()
    other = DenoisedClassifier(half.denoiser.at(0.5), starter).eval()
    assert models.fingerprint(half) != models.fingerprint(other)
    engine = Smoothed(half, 0.25, precision="bfloat16")
    record = engine.sample(digits.take("first:1"), n=100, n0=20, progress=False)
    assert record.identity.precision == "bfloat16" and sum(record.rows()["counts"].iloc[1]) == 100


def test_images_in_the_denoiser_s_own_range_are_refused(starter):
    """A denoiser's [-1, 1] stays inside; images come on [0, 1]."""
    base = DenoisedClassifier(denoiser(lambda x, t: x), starter)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Smoothed(base, 0.25).sample(2 * data.load("digits")[0][None] - 1, n=100, progress=False)


def test_a_larger_classifier_resizes_after_the_denoiser():
    seen = []
    big = models.wrap(Model(lambda x, _=None: seen.append(x.shape) or x.mean((2, 3))), size=(32, 32), channels=3)
    big.network.forward = lambda x: seen.append(tuple(x.shape)) or x.mean((2, 3))
    base = DenoisedClassifier(denoiser(lambda x, t: torch.zeros_like(x)), big)
    assert base(torch.rand(2, 1, 8, 8)).shape == (2, 3) and seen == [(2, 3, 32, 32)]


def test_parts_are_checked(starter):
    with pytest.raises(ValueError, match="denoiser must be a Denoiser, got Linear"):
        DenoisedClassifier(nn.Linear(1, 1), starter)
    with pytest.raises(ValueError, match="classifier must be a Module, got function"):
        DenoisedClassifier(Identity(), lambda x: x)
    with pytest.raises(TypeError, match="abstract"):
        Denoiser()


# --- the starter -----------------------------------------------------------------------------------------


def test_the_starter_makes_a_clean_classifier_certifiable(digits, clean):
    """The digits' own diffusion model: half of the noise's error is gone, and votes agree where they did not."""
    if not (data.data_dir() / "starters" / "digits-ddpm").is_dir():
        pytest.skip("data/starters/digits-ddpm is not there: python data/make_diffusion.py trains it")
    images = digits.take("every:36")
    for sigma in (0.25, 0.5):
        model = load_diffusion("starter:digits-ddpm", sigma=sigma)
        noisy = images.batch() + sigma * torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert psnr(model(noisy), images.batch()).mean() > psnr(noisy, images.batch()).mean() + 6
    table, alone = (
        certificates(rows_of(base, images, sigma=0.5, n=100)) for base in (DenoisedClassifier(model, clean), clean)
    )
    assert (table["correct"] & (table["radius"] > 0.2)).sum() >= 5 > (alone["correct"] & (alone["radius"] > 0.2)).sum()
