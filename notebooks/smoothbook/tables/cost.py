"""About how long making rows will take, from timed forward passes."""

import time
from collections.abc import Iterable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from smoothbook.sigma.search import SigmaSearch
from smoothbook.tables.build import build, certified_images
from smoothbook.tables.selectors import SmoothedVotes, read_search, read_selector
from smoothbook.tables.settings import Row
from smoothbook.training.attacks import noisy_logits
from smoothkit.data import Images

TRIAL = 64  # images to measure a forward pass with


def cost(rows: Iterable[Row], images: Mapping[str, tuple[Images, Images]]) -> tuple[float, float]:
    """Seconds of training and of certifying.

    Rows made from others are not built for it; a pass of theirs counts as the average of the rest.

    Parameters
    ----------
    rows : iterable of Row
    images : mapping
        Training and test images by the name of the data set.
    """
    by_name = {row.name: row for row in rows}
    forward = {name: forward_seconds(row, images[row.data][0]) for name, row in by_name.items() if not row.made_from}
    average = sum(forward.values()) / max(1, len(forward))
    training, certifying, seen = 0.0, 0.0, set()
    for name, row in by_name.items():
        train, test = images[row.data]
        seconds, trained = forward.get(name, average), set(row.made_from) <= by_name.keys()
        certifying += seconds * certifying_passes(row, len(certified_images(row, train, test)), train)
        if trained and (digest := row.training_digest(by_name)) not in seen:
            seen.add(digest)
            training += seconds * training_passes(row, len(train.take(row.train_images)))
    return training, certifying


def forward_seconds(row: Row, train: Images) -> float:
    """Seconds of a forward pass of one image."""
    model = build(row, image_shape=tuple(train[0].shape)).eval()
    batch = train.batch(0, TRIAL)
    with torch.inference_mode():
        model(batch)
        began = time.perf_counter()
        noisy_logits(model, batch, torch.zeros(4, *batch.shape))
    return (time.perf_counter() - began) / (4 * len(batch))


def certifying_passes(row: Row, images: int, train: Images) -> float:
    """Forward passes that the votes cost, those of searching sigmas and making a selector among them."""
    search = read_search(row.search) if row.search else SigmaSearch()
    searched = 3 * search.steps * search.draws + 2 * search.pilot
    if not row.selector:
        return images * (row.n0 + row.n + bool(row.search) * searched)
    selector = read_selector(row.selector)
    made_on = len(train.take(selector.train_images))
    smoothed = isinstance(selector, SmoothedVotes)
    trained = 3 * selector.epochs * made_on if smoothed else 0
    return images * (row.n0 + row.n) * (1 + smoothed) + made_on * searched + trained


def training_passes(row: Row, images: int) -> float:
    """Forward passes that a training costs, a backward pass counted as two."""
    if row.method == "clean":
        return 0.0
    if row.method == "coordinator":
        return row.steps * row.batch * 2 * row.spsa.get("repeats", 5)
    if row.method == "denoiser":  # calibration denoises two copies, and has the diffusion model's own loss
        copies, before = 3 if "calibration" in row.denoiser else 1, (row.denoiser.get("mse") or {}).get("epochs", 0)
        return (row.epochs + before) * images * (1 - row.validation) * 3 * copies
    copies = row.loss_settings.get("copies", {"macer": 16, "smoothadv": 2, "consistency": 2}.get(row.loss, 1))
    attacked = row.loss_settings.get("steps", 10) if "epsilon" in row.loss_settings else 0
    passes = 3 * (copies + (row.loss == "stability")) + 3 * copies * attacked
    return row.epochs * images * (1 - row.validation) * passes


def multiplications(row: Row, rows: Mapping[str, Row], image: torch.Tensor) -> float:
    """Multiplications of a forward pass of one image [C, H, W] of a row's classifier; LoRA merged, as it is deployed.

    Unlike seconds they do not depend on the machine. `rows` are those of the table, which the row may be made from.
    """
    classifier = build(row, image_shape=tuple(image.shape), trained=lambda other: build(rows[other])).eval()
    classifier = classifier.merged() if hasattr(classifier, "merged") else classifier
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        classifier(image[None])
    return counter.get_total_flops() / 2
