"""Train the small diffusion model of the digits and write it as a diffusers pipeline, with a card.

    python data/make_diffusion.py [--steps 1500] [--out data/starters/digits-ddpm]
    python data/make_diffusion.py --measure [--images 100] [--n 300]     what it does for the clean starter

A DDPM (Ho et al. 2020) on the 1,257 training digits, as 8x8 images on [-1, 1]: a UNet2DModel of 0.7 million
parameters, noise prediction, the linear schedule of 1,000 steps, and an average of the weights, which is what is
kept. The validation split is only looked at, the test split not at all. Seeded: the same versions on the same kind of
processor give the same file. Some five minutes on one free core (0.17 s a step).
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from smoothkit import Smoothed, data, models
from smoothkit.certify import certificates
from smoothkit.certify.cascade import cascade_certificates
from smoothkit.denoise import DenoisedClassifier, DiffusionDenoiser, alphas_bar_of, load_diffusion, psnr
from smoothkit.report import certified_accuracy
from smoothkit.training.fit import rate_factor

HERE = Path(__file__).parent
OUT = HERE / "starters" / "digits-ddpm"
ARCHITECTURE = dict(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=16,
)  # fmt: skip
SCHEDULE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)
BATCH, LR, WARMUP, DECAY = 64, 1e-3, 0.05, 0.997
SIGMAS = (0.12, 0.25, 0.5, 0.75, 1.0)
SEED = 20200619


def train(steps: int) -> tuple[torch.nn.Module, DDPMScheduler]:
    pixels = 2 * data.load("digits", split="train").batch() - 1
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    unet, scheduler = UNet2DModel(**ARCHITECTURE), DDPMScheduler(**SCHEDULE)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, steps, warmup=WARMUP, cosine=True)
    )
    unet.train()
    began = time.perf_counter()
    for step in range(steps):
        clean = pixels[torch.randint(len(pixels), (BATCH,), generator=generator)]
        # each image in another part of the schedule, and half of them where one-shot denoising asks: sigma 1 is t = 396
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        t = (spread * torch.tensor([SCHEDULE["num_train_timesteps"], 450]).repeat(BATCH // 2)).long()
        noise = torch.randn(clean.shape, generator=generator)
        loss = F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(unet)
        if step % 500 == 499 or step + 1 == steps:
            seen = denoising_psnr(average.module, scheduler, "validation")
            seconds = time.perf_counter() - began
            print(f"  step {step + 1}: loss {loss.item():.4f}, validation PSNR {seen}, {seconds:.0f} s", flush=True)
            unet.train()
    return average.module.eval(), scheduler


@torch.inference_mode()
def denoising_psnr(unet: torch.nn.Module, scheduler: DDPMScheduler, split: str, copies: int = 2) -> dict[str, float]:
    """Mean PSNR in decibels of one-shot denoised images, by sigma in pixel units."""
    unet.eval()
    images = data.load("digits", split=split).batch().repeat(copies, 1, 1, 1)
    result = {}
    for sigma in SIGMAS:
        denoiser = DiffusionDenoiser(unet, alphas_bar_of(scheduler), sigma=sigma)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
        result[f"{sigma:g}"] = round(float(psnr(denoiser(images + sigma * noise), images).mean()), 2)
    return result


def save(unet: torch.nn.Module, scheduler: DDPMScheduler, out: Path, steps: int, seconds: float) -> None:
    DDPMPipeline(unet, scheduler).save_pretrained(out, safe_serialization=True)
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0o644)  # safetensors writes for the owner alone
    card = {
        "name": out.name,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "trained_on": "digits, training split (1,257 images), as [-1, 1]",
        "steps": steps,
        "batch": BATCH,
        "seed": SEED,
        "seconds": round(seconds),
        "maker": "data/make_diffusion.py",
        "versions": {
            "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__, "numpy": np.__version__,
        },
        "test_psnr_of_one_shot_denoising_by_sigma": denoising_psnr(unet, scheduler, "test"),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "license": "MIT",
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{out.name}: {card['test_psnr_of_one_shot_denoising_by_sigma']}", flush=True)


def measure(out: Path, images: int, n: int) -> None:
    """Certified accuracy of the clean starter alone and behind the diffusion model, and of both scales together."""
    digits, clean = data.load("digits").take(f"first:{images}"), models.load("starter:digits-vit-clean")
    records = {}
    for sigma in (0.25, 0.5):
        denoised = DenoisedClassifier(load_diffusion(out, sigma=sigma), clean)
        for what, base in (("clean starter", clean), ("diffusion + clean starter", denoised)):
            record = Smoothed(base, sigma).sample(digits, n0=50, n=n, progress=False)
            records[what, sigma] = record
            report(f"{what} at sigma {sigma:g}", certificates(record))
    scales = {sigma: records["diffusion + clean starter", sigma] for sigma in (0.25, 0.5)}
    for rule in ("cascade", "max", "released"):
        report(f"diffusion, two scales, rule {rule}", cascade_certificates(scales, rule=rule))


def report(name: str, table: pd.DataFrame) -> None:
    radii = (0.0, 0.25, 0.5, 0.75)
    shares = ", ".join(f"{r:g}: {a:.1%}" for r, a in zip(radii, certified_accuracy(table, radii), strict=True))
    calls = f", {table['calls'].mean():,.0f} calls an image" if "calls" in table else ""
    print(f"{name}: certified accuracy at {shares}{calls}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--n", type=int, default=300)
    options = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    if options.measure:
        measure(options.out, options.images, options.n)
        return
    start = time.perf_counter()
    unet, scheduler = train(options.steps)
    save(unet, scheduler, options.out, options.steps, time.perf_counter() - start)


if __name__ == "__main__":
    main()
