"""Train the starter models and write them in timm's hub layout, each with a card.

    python data/make_starters.py [--only digits-vit-0.25] [--epochs 400]

One model a run of the loop below: a 136,000-parameter ViT on 8x8 digits, trained on the training split
with fresh Gaussian noise in every step (Cohen et al. 2019), sigma rising over the first third, and no
other augmentation (shifts by a pixel cost 11 points at sigma 0.5). The average of the weights is kept
after the last epoch; validation is only printed. Seeded: the same versions on the same
kind of processor give the same file. Two to four minutes a model on two cores.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import save_for_hf
from torch.nn import functional as F

from smoothkit import Purpose, data, noisy_copies

HERE = Path(__file__).parent
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0)
MEAN, STD = 0.3, 0.4  # of the training pixels, rounded
SIGMAS = {"digits-vit-clean": 0.0, "digits-vit-0.12": 0.12, "digits-vit-0.25": 0.25, "digits-vit-0.50": 0.5}
SEED = 20190208


def noise(images: torch.Tensor, sigma: float, epoch: int, first: int) -> torch.Tensor:
    """Grid noise from the training purpose; the sample index is the epoch."""
    if sigma == 0:
        return images
    one_batch = images.reshape(1, -1, images.shape[-1])  # one big image: one stream for the batch
    noisy = noisy_copies(
        one_batch, sigma=sigma, seed=SEED, purpose=Purpose.TRAIN, image_id=first, start=epoch, stop=epoch + 1, grid=256
    )
    return noisy.reshape(images.shape)


def train(sigma: float, epochs: int, batch: int = 128) -> torch.nn.Module:
    images, labels = data.load("digits", split="train").batch(), data.load("digits", split="train").labels
    labels = torch.from_numpy(labels)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    for epoch in range(epochs):
        model.train()
        level = sigma * min(1.0, (epoch + 1) / (epochs / 3))
        order = torch.randperm(len(images), generator=generator)
        for first in range(0, len(images) - batch + 1, batch):
            chosen = order[first : first + batch]
            noisy = noise(images[chosen], level, epoch, first)
            loss = F.cross_entropy(model((noisy - MEAN) / STD), labels[chosen], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if epoch % 50 == 49:
            print(
                f"  epoch {epoch + 1}: loss {loss.item():.3f}, validation {accuracies(of(average.module), 'validation')}",
                flush=True,
            )
    return average.module.eval()


def mixture_rule(sigma: float, bandwidth: float = 0.1):
    """The best guess if digits were the training ones, blurred by `bandwidth`: a yardstick without training."""
    known = data.load("digits", split="train")
    centres, labels = known.batch().flatten(1), torch.from_numpy(known.labels)
    variance = sigma**2 + bandwidth**2

    def scores(images: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(-(torch.cdist(images.flatten(1), centres) ** 2) / (2 * variance), dim=1)
        return torch.zeros(len(images), 10).index_add_(1, labels, weights)

    return scores


def of(model: torch.nn.Module):
    """A trained network as `accuracies` wants it: the same at every sigma."""
    model.eval()
    return lambda sigma: lambda images: model((images - MEAN) / STD)


@torch.inference_mode()
def accuracies(classifier_at, split: str, copies: int = 20) -> dict[str, float]:
    """Accuracy of a base classifier, clean and over `copies` noisy copies an image; it may know sigma."""
    held_out = data.load("digits", split=split)
    result = {}
    for sigma in (0.0, 0.12, 0.25, 0.5, 1.0):
        right, classifier = 0, classifier_at(sigma)
        for copy in range(copies if sigma else 1):
            noisy = noise(held_out.batch(), sigma, epoch=copy, first=2**32)  # apart from the training streams
            right += int((classifier(noisy).argmax(1).numpy() == held_out.labels).sum())
        result[f"{sigma:g}"] = round(right / len(held_out) / (copies if sigma else 1), 4)
    return result


def save(model: torch.nn.Module, name: str, sigma: float, epochs: int, seconds: float) -> None:
    folder = HERE / "starters" / name
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(c) for c in range(10)]
    pretrained_cfg = {
        "input_size": [1, 8, 8], "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": [MEAN], "std": [STD], "num_classes": 10, "first_conv": "patch_embed.proj", "classifier": "head",
        "label_names": names, "license": "mit",
    }  # fmt: skip
    config = dict(pretrained_cfg={"architecture": ARCHITECTURE, "tag": name, **pretrained_cfg})
    save_for_hf(model, str(folder), model_config=config, model_args=MODEL_ARGS, safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)
    card = {
        "name": name,
        "architecture": ARCHITECTURE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": "digits, training split (1,257 images)",
        "sigma": sigma,
        "epochs": epochs,
        "seed": SEED,
        "seconds": round(seconds),
        "maker": "data/make_starters.py",
        "versions": {"torch": torch.__version__.split("+")[0], "timm": timm.__version__, "numpy": np.__version__},
        "test_accuracy_of_the_base_classifier_by_sigma": accuracies(of(model), "test"),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "license": "MIT",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{name}: {card['test_accuracy_of_the_base_classifier_by_sigma']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SIGMAS, action="append")
    parser.add_argument("--epochs", type=int, default=400)
    options = parser.parse_args()
    (HERE / "starters").mkdir(exist_ok=True)
    (HERE / "starters" / "mixture-rule.json").write_text(json.dumps(accuracies(mixture_rule, "test"), indent=2) + "\n")
    for name in options.only or SIGMAS:
        print(f"{name}: {options.epochs} epochs at sigma {SIGMAS[name]:g}", flush=True)
        start = time.perf_counter()
        model = train(SIGMAS[name], options.epochs)
        save(model, name, SIGMAS[name], options.epochs, time.perf_counter() - start)


if __name__ == "__main__":
    main()
