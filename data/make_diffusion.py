"""Train a small diffusion model and write it as a diffusers pipeline, with a card.

    python data/make_diffusion.py [digits-ddpm] [--steps 2500] [--out data/starters/digits-ddpm]
    python data/make_diffusion.py cifar10-ddpm                           reduced: for one CPU core
    python data/make_diffusion.py cifar10-ddpm-large --device cuda       for a GPU

DDPMs (Ho et al. 2020) of training images on [-1, 1]: a UNet2DModel with noise prediction, the linear schedule of 1,000
steps, and an average of the weights, which is what is kept, rounded to half precision. Validation images are only looked
at, test images only for the card. Seeded: the same versions on the same kind of processor give the same file. A checkpoint
is kept in runs/diffusion, where an interrupted training goes on. On one free core the digits take some ten minutes
(0.17 s a step) and cifar10-ddpm half an hour (0.65 s); cifar10-ddpm-large has not been run. CIFAR-10 is found by SMOOTHKIT_DATA.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from smoothbook.denoise import DiffusionDenoiser, alphas_bar_of, psnr
from smoothbook.training import crop_and_flip
from smoothbook.training.checkpoint import check_identity, fill, read_checkpoint, write_checkpoint
from smoothbook.training.fit import rate_factor
from smoothkit import data, models

HERE = Path(__file__).parent
STARTERS, BUILD = HERE / "starters", HERE.parent / "runs" / "diffusion"
SCHEDULE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)
LR, WARMUP = 1e-3, 0.05
SIGMAS = (0.12, 0.25, 0.5, 0.75, 1.0)
SEED = 20200619
CHECKPOINT = 100  # steps


def blocks(kind: str, levels: int, attention: set[int]) -> tuple[str, ...]:
    """Block names of a UNet's way down or up; `attention` counts levels from the finest."""
    names = [f"{'Attn' if i in attention else ''}{kind}Block2D" for i in range(levels)]
    return tuple(names if kind == "Down" else names[::-1])


def architecture(size: int, channels: int, widths: tuple[int, ...], attention: set[int], **settings) -> dict:
    return dict(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=widths,
        norm_num_groups=8, attention_head_dim=16, down_block_types=blocks("Down", len(widths), attention),
        up_block_types=blocks("Up", len(widths), attention),
    ) | settings  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its training; `train` and `validation` are (split, rule) of the data set."""

    data: str
    unet: dict
    steps: int
    train: tuple[str, str] = ("train", "all")
    validation: tuple[str, str] = ("validation", "all")
    test: str = "all"
    flip: bool = False
    batch: int = 64
    lr: float = LR
    average: float = 0.997
    bf16: bool = False


ON_CIFAR10 = dict(train=("train", "range:200:50000"), validation=("train", "first:200"), test="every:50", flip=True)
RECIPES = {
    "digits-ddpm": Recipe("digits", architecture(8, 1, (32, 64), {1}), steps=2500),
    "cifar10-ddpm": Recipe(
        "cifar10", architecture(32, 3, (16, 32, 64, 96), {2}), steps=3000, batch=32, average=0.995, **ON_CIFAR10,
    ),
    "cifar10-ddpm-large": Recipe(
        "cifar10", architecture(32, 3, (128, 256, 256, 256), {1}, layers_per_block=2, norm_num_groups=32),
        steps=60_000, batch=256, lr=3e-4, average=0.9995, bf16=True, **ON_CIFAR10,
    ),
}  # fmt: skip


def training_pixels(recipe: Recipe) -> Tensor:
    """All training images as bytes."""
    split, rule = recipe.train
    images = data.load(recipe.data, split=split).take(rule)
    if recipe.data == "digits":
        return images.batch()
    return torch.cat([(images.batch(i, i + 1000) * 255).round().byte() for i in range(0, len(images), 1000)])


def as_model_sees(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
    if recipe.flip:
        pixels = crop_and_flip(pixels, generator, pad=0)
    return 2 * pixels - 1


def train(name: str, steps: int, out: Path, device: str) -> tuple[torch.nn.Module, DDPMScheduler, float]:
    recipe = RECIPES[name]
    pixels = training_pixels(recipe)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    unet, scheduler = UNet2DModel(**recipe.unet).to(device), DDPMScheduler(**SCHEDULE)
    if len(recipe.unet["block_out_channels"]) > 2:  # faster there
        unet = unet.to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    average_of = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=average_of)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.lr, weight_decay=1e-4)
    identity = json.loads(json.dumps({**dataclasses.asdict(recipe), "steps": steps, "seed": SEED}))
    first, before = restored(out, identity, unet, average, optimizer, generator)
    began = time.perf_counter() - before
    unet.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate_factor(step, steps, warmup=WARMUP, cosine=True)
        chosen = torch.randint(len(pixels), (recipe.batch,), generator=generator)
        clean = as_model_sees(pixels[chosen], recipe, generator)
        # each image in another part of the schedule, and half of them where one-shot denoising asks: sigma 1 is t = 396
        spread = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)) / recipe.batch
        t = (spread * torch.tensor([SCHEDULE["num_train_timesteps"], 450]).repeat(recipe.batch // 2)).long()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device.partition(":")[0], dtype=torch.bfloat16, enabled=recipe.bf16):
            answer = unet(noisy.to(device), t.to(device)).sample
        loss = F.mse_loss(answer.float(), noise.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        done, seconds = step + 1, time.perf_counter() - began
        if done % CHECKPOINT == 0 or done == steps:
            write_checkpoint(out, {
                "step": done, "seconds": seconds, "identity": identity, "weights": unet.state_dict(),
                "average": average.state_dict(), "optimizer": optimizer.state_dict(), "draws": generator.get_state(),
            })  # fmt: skip
        if done % 500 == 0 or done == steps:
            seen = denoising_psnr(average.module, scheduler, recipe, *recipe.validation)
            print(f"  step {done}: loss {loss.item():.4f}, validation PSNR {seen}, {seconds:.0f} s", flush=True)
            unet.train()
    return average.module.eval(), scheduler, time.perf_counter() - began


def restored(out: Path, identity: dict, unet, average, optimizer, generator) -> tuple[int, float]:
    """Take up the training kept in `out`, if there is one; the steps done and the seconds they took."""
    kept = read_checkpoint(out)
    if kept is None:
        return 0, 0.0
    check_identity(kept["identity"], identity, out)
    fill(unet.state_dict(), kept["weights"], out)
    fill(average.state_dict(), kept["average"], out)
    optimizer.load_state_dict(kept["optimizer"])
    generator.set_state(kept["draws"])
    print(f"  going on from step {kept['step']}", flush=True)
    return kept["step"], kept["seconds"]


@torch.inference_mode()
def denoising_psnr(
    unet: torch.nn.Module, scheduler: DDPMScheduler, recipe: Recipe, split: str, rule: str
) -> dict[str, float]:
    """Mean PSNR in decibels of one-shot denoised images, by sigma in pixel units."""
    unet.eval()
    device = next(unet.parameters()).device
    images = data.load(recipe.data, split=split).take(rule).batch().repeat(2, 1, 1, 1)
    result = {}
    for sigma in SIGMAS:
        denoiser = DiffusionDenoiser(unet, alphas_bar_of(scheduler), sigma=sigma)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
        noisy = (images + sigma * noise).to(device)
        clean = torch.cat([denoiser(part) for part in noisy.split(100)]).cpu()
        result[f"{sigma:g}"] = round(float(psnr(clean, images).mean()), 2)
    return result


def save(name: str, unet: torch.nn.Module, scheduler: DDPMScheduler, out: Path, steps: int, seconds: float) -> None:
    recipe = RECIPES[name]
    models.round_to_half(unet)
    seen = denoising_psnr(unet, scheduler, recipe, "test", recipe.test)
    DDPMPipeline(unet.half(), scheduler).save_pretrained(out, safe_serialization=True)
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0o644)  # safetensors writes for the owner alone
    images = data.load(recipe.data, split=recipe.train[0]).take(recipe.train[1])
    card = {
        "name": out.name,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "trained_on": f"{images.name}, {len(images):,} images, as [-1, 1]",
        "steps": steps,
        "batch": recipe.batch,
        "seed": SEED,
        "seconds": round(seconds),
        "maker": "data/make_diffusion.py",
        "versions": {
            "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__, "numpy": np.__version__,
        },
        "test_psnr_of_one_shot_denoising_by_sigma": seen,
        "weights": "rounded to half precision",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "license": "MIT",
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{out.name}: {card['test_psnr_of_one_shot_denoising_by_sigma']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=list(RECIPES), default="digits-ddpm")
    parser.add_argument("--steps", type=int, help="those of the recipe by default")
    parser.add_argument("--out", type=Path, help="data/starters/MODEL by default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    out = options.out or STARTERS / options.model
    steps = options.steps or RECIPES[options.model].steps
    unet, scheduler, seconds = train(options.model, steps, BUILD / f"{options.model}-{steps}", options.device)
    save(options.model, unet.cpu(), scheduler, out, steps, seconds)


if __name__ == "__main__":
    main()
