"""Denoisers."""

import json
import types

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    Halves,
    eight,
    few,
    float32s,
    folder,
    holds,
    mostly,
    nested,
    numbers,
    odd_floats,
    refused,
    shares,
    sigmas,
    small,
    some_of,
    texts,
)
from properties.training import one_of_the_losses
from smoothbook import denoise, training
from smoothbook.tables.denoisers import read_denoiser


class Nothing(torch.nn.Module):
    """Predicts no noise at any timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x


falling = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
schedules = st.one_of(
    st.just(falling),
    st.just(falling),
    npst.arrays(
        np.float64,
        npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=5),
        elements=odd_floats(min_value=-1, max_value=2),
    ),
)


@holds(schedules, sigmas)
def timesteps_are_noisy_enough(alphas_bar, sigma):
    step = denoise.timestep_for(alphas_bar, sigma)
    assert isinstance(step, denoise.Timestep) and step.sigma >= sigma and 0 < step.alpha_bar <= 1
    assert step.t == 0 or denoise.schedule_sigmas(alphas_bar)[step.t - 1] < sigma


@holds(schedules)
def noise_levels_rise(alphas_bar):
    levels = denoise.schedule_sigmas(alphas_bar)
    assert len(levels) and (levels >= 0).all() and (levels[1:] >= levels[:-1]).all()


@holds(npst.arrays(np.float32, st.integers(0, 4), elements=float32s))
def schedules_of_schedulers(betas):
    found = denoise.alphas_bar_of(types.SimpleNamespace(betas=torch.from_numpy(betas)))
    assert len(found) and ((found >= 0) & (found <= 1)).all()


@holds(
    schedules,
    sigmas,
    mostly(st.sampled_from(["epsilon", "sample", "v_prediction"]), st.just("x")),
    mostly(st.sampled_from(["exact", "schedule"]), st.just("x")),
    mostly(st.sampled_from(["hard", "straight-through", "none"]), st.just("x")),
    mostly(st.just(1), small),
    mostly(st.sampled_from([None, 12]), small),
)
def diffusion_denoisers(alphas_bar, sigma, prediction, noise, clamp, steps, pad_to):
    known = dict(prediction=prediction, noise=noise, clamp=clamp, steps=steps, pad_to=pad_to)
    made = denoise.DiffusionDenoiser(Nothing(), alphas_bar, sigma=sigma, **known)
    images = eight().batch(0, 2)
    clean = made(images)
    assert clean.shape == images.shape and bool(clean.isfinite().all()) and made.noise_sigma >= sigma
    assert clamp != "hard" or bool(((clean >= -1e-6) & (clean <= 1 + 1e-6)).all())
    assert isinstance(denoise.DenoisedClassifier(made, Halves()).denoiser, denoise.Denoiser)


@holds(st.lists(sigmas, min_size=2, max_size=2), schedules)
def denoising_at_a_sigma_each(wanted, alphas_bar):
    made = denoise.DiffusionDenoiser(Nothing(), alphas_bar, sigma=0.1)
    clean = denoise.denoise_at(made, eight().batch(0, 2), torch.tensor(wanted))
    assert clean.shape == (2, 1, 8, 8) and bool(clean.isfinite().all())


@holds(
    st.sampled_from(["calibration", "denoising", "objective"]),
    mostly(few, shares),
    mostly(st.just(1.0), numbers),
    mostly(st.just(2), small),
    mostly(st.just("mse"), texts),
    mostly(st.just([0.1, 0.25]), st.lists(sigmas, max_size=2)),
    share=0.15,
)
def denoisers_in_training(kind, a, b, copies, objective, scales):
    if kind == "objective":
        loss = denoise.Denoising(objective, copies=copies)
        assert loss.objective == objective
        return
    loss = one_of_the_losses(kind, a, b, copies)
    settings = training.FitSettings(epochs=1, batch=4, lr=5e-5, progress=False, validation=None)
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    with refused(training.TrainingDiverged):
        if kind == "denoising":
            net = denoise.DnCNN(1, sigma=scales[0] if scales else 0.25, depth=2, width=2)
            done = denoise.fit_denoiser(net, eight(), settings)
        else:
            made = denoise.DiffusionDenoiser(Nothing(), falling, sigma=0.1)
            done = denoise.calibrate(made, head, eight(), settings, sigmas=tuple(scales), loss=loss)
    assert all(bool(p.isfinite().all()) for p in done.model.parameters())


@holds(mostly(st.just(2), small), mostly(st.just(2), small), mostly(st.just(1), small), sigmas, share=0.3)
def trained_denoisers(depth, width, channels, sigma):
    made = denoise.DnCNN(channels, sigma=sigma, depth=depth, width=width).eval()
    rows = torch.rand(2, channels, 4, 4)
    assert torch.equal(made(rows), rows) and torch.equal(denoise.Identity()(rows), rows)  # before training
    with folder() as place:
        again = denoise.load_denoiser(made.save(place / "d"))
        assert torch.equal(again(rows), rows)


@holds(nested("kind", "settings", "sigma", "depth"), share=0.5)
def saved_denoisers_of_any_json(content):
    with folder() as place:
        (place / "denoiser.json").write_text(json.dumps(content))
        (place / "denoiser.safetensors").write_bytes(b"")
        denoise.load_denoiser(place)
        raise AssertionError("no weights were there")


@holds(
    st.one_of(
        nested("diffusion", "dncnn", "calibration", "sigmas", "objective"),
        some_of(
            {"diffusion": "x", "lora": 2, "calibration": {"brier": 1.0}, "sigmas": [0.25]},
            ("noise", "steps"),
            nested("brier", "anti"),
        ),
        some_of({"dncnn": {"depth": 4}, "objective": "mse"}, ("mse",), nested("depth", "epochs")),
    ).filter(lambda x: isinstance(x, dict)),
    st.booleans(),
)  # fmt: skip
def settings_of_a_denoiser(settings, trained):
    read_denoiser(settings, trained=trained)
    assert len({"diffusion", "dncnn"} & settings.keys()) == 1


@holds(
    npst.arrays(np.float32, (2, 1, 2, 2), elements=float32s),
    npst.arrays(
        np.float32,
        mostly(st.just((2, 1, 2, 2)), st.sampled_from([(1, 1, 2, 2), (3, 2)])),
        elements=st.floats(0, 1, width=32),
    ),
)
def signal_to_noise(images, clean):
    found = denoise.psnr(torch.from_numpy(images), torch.from_numpy(clean))
    assert found.shape == (2,) and (not np.isfinite(images).all() or not bool(found.isnan().any()))


UNET = {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "sample_size": 8}
BETAS = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 10,
    "beta_schedule": "linear",
}


@holds(
    st.one_of(nested(*UNET), some_of(UNET)),
    st.one_of(nested(*BETAS), some_of(BETAS, ("trained_betas", "prediction_type"))),
    st.binary(max_size=30),
    st.booleans(),
    share=0.3,
)
def diffusion_folders_of_any_json(unet, scheduler, weights, side_by_side):
    with folder() as place:
        for sub, name, content in (("unet", "config.json", unet), ("scheduler", "scheduler_config.json", scheduler)):
            at = place if side_by_side else place / sub
            at.mkdir(exist_ok=True)
            (at / name).write_text(json.dumps(content))
        (place / ("" if side_by_side else "unet") / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        denoise.load_diffusion(place, sigma=0.25)
        raise AssertionError("no weights were there")
