"""What certifying a data set would take, before anybody pays for it: calls, hours, bytes, and the record's size.

Speeds and savings come from the committed benchmarks (data/benchmarks), or are given; nothing here is guessed. Times are
those of the forward passes at the measured speed, shared equally: they leave out loading, and the last images of a run,
when some machines have nothing to do.
"""

import dataclasses
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from smoothkit.certify.bounds import check_reach, radius_cap
from smoothkit.data import DataMissing, data_dir, load
from smoothkit.records import ESTIMATE, SELECT, Identity, Row, create_record, read_json
from smoothkit.types import StoppingRule, block_edges, check_alpha, check_samples

# images of the test split, shape, classes: of the sets that need not be at hand for a plan
KNOWN = {
    "imagenet": (50_000, (3, 224, 224), 1_000),
    "cifar10": (10_000, (3, 32, 32), 10),
    "tiny-imagenet-32": (10_100, (3, 32, 32), 202),
}
MEASURED = 1_000_000  # samples of an image of which a record is written to be measured
SAMPLE = 50  # images of the part that is written to measure how large a record becomes


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one way to sample takes. `gpu_hours` and what follows from it is None where no speed or price is known."""

    rule: str
    samples_per_image: float
    calls: float
    gpu_hours: float | None = None
    hours: float | None = None
    cost: float | None = None

    @classmethod
    def of(cls, rule: str, samples: float, images: int, gpus: int, rate: float | None, price: float | None) -> "Cost":
        """The cost of so many samples an image, shared by GPUs that draw `rate` a second and cost `price` an hour."""
        calls = images * samples
        if rate is None:
            return cls(rule, samples, calls)
        gpu_hours = calls / rate / 3_600
        return cls(rule, samples, calls, gpu_hours, gpu_hours / min(gpus, images), price and gpu_hours * price)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan: the costs by rule, the bytes that go to and come from each machine, the record's size, and notes."""

    images: int
    gpus: int
    costs: tuple[Cost, ...]
    bytes_out: int  # images to all machines, each once
    bytes_model: int | None  # the model, once to each
    bytes_back: int  # counts
    bytes_record: int
    cap: float
    notes: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """One row a quantity, in words for people."""
        rows = [("images", f"{self.images:,}"), ("largest radius that can be certified", f"{self.cap:.3f} sigma")]
        for cost in self.costs:
            rows.append((f"{cost.rule}: noisy copies an image", f"{cost.samples_per_image:,.0f}"))
            rows.append((f"{cost.rule}: network calls", f"{cost.calls:,.0f}"))
            if cost.gpu_hours is not None:
                rows.append((f"{cost.rule}: hours on {self.gpus:,}", f"{cost.hours:,.2f}"))
                rows.append((f"{cost.rule}: hours of one", f"{cost.gpu_hours:,.1f}"))
            if cost.cost is not None:
                rows.append((f"{cost.rule}: cost", f"{cost.cost:,.2f}"))
        rows.append(("images sent, each once", _size(self.bytes_out)))
        if self.bytes_model is not None:
            rows.append((f"model sent to {self.gpus:,}, each once", _size(self.bytes_model * self.gpus)))
        rows.append(("counts sent back (fixed n)", _size(self.bytes_back)))
        rows.append(("record on disk (fixed n)", _size(self.bytes_record)))
        return pd.DataFrame(rows, columns=["what", "value"])


def plan(
    dataset: str,
    model: str,
    *,
    n: int = 100_000,
    n0: int = 100,
    alpha: float = 0.001,
    gpus: int = 1,
    rate: float | None = None,
    images: int | None = None,
    price: float | None = None,
) -> Plan:
    """What a run would take.

    Parameters
    ----------
    dataset : str
        As in `data.load`; `imagenet` and `cifar10` need not be at hand.
    model : str
        A network of the benchmarks, whose speed is known, or a model as in `models.load`, whose size then is.
    n, n0, alpha : as in a fixed stopping rule
    gpus : int
        How many share the work: GPUs, or cores where the speed is that of a core.
    rate : float, optional
        Noisy copies a second of one of them; by default from the committed benchmarks.
    images : int, optional
        How many; all of the test split if not given.
    price : float, optional
        Of one of them for an hour.

    Returns
    -------
    Plan, with the fixed n, and with early stopping at the radii for which `bench samples` has measured it
    """
    check_alpha(alpha)
    check_reach(n, alpha)
    for name, value in (("n0", n0), ("gpus", gpus), *((("images", images),) if images is not None else ())):
        check_samples(name, value)
    for name, value in (("rate", rate), ("price", price)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    total, shape, classes = _about(dataset)
    images = images or total
    notes = []
    if rate is None:
        rate, said = known_rate(model)
        notes.append(said)
    else:
        notes.append(f"speed as given: {rate:,.0f} noisy copies a second each")
    ways = {"fixed n": n + n0}
    ways |= {f"until radius {r:g} is decided": mean + n0 for r, mean in _early(dataset, n, alpha, notes).items()}
    blocks = len(block_edges(n0)) + len(block_edges(n)) - 2
    return Plan(
        images=images,
        gpus=gpus,
        costs=tuple(Cost.of(rule, samples, images, gpus, rate, price) for rule, samples in ways.items()),
        bytes_out=images * math.prod(shape) * 4,
        bytes_model=_bytes_of(model, notes),
        bytes_back=images * blocks * classes * 8,
        bytes_record=int(images * bytes_per_image(n0, n, alpha, classes)),
        cap=radius_cap(n, alpha, 1.0),
        notes=tuple(notes),
    )


def _about(dataset: str) -> tuple[int, tuple[int, ...], int]:
    try:
        found = load(dataset)
    except DataMissing:
        if dataset not in KNOWN:
            raise
        return KNOWN[dataset]
    classes = len(found.class_names) or int(found.labels.max()) + 1
    return len(found), tuple(found[0].shape), max(classes, 2)


def known_rate(model: str, folder: Path | None = None) -> tuple[float | None, str]:
    """Noisy copies a second of one GPU, or else of one CPU core, from the committed benchmarks; and a sentence on it."""
    folder = folder or data_dir() / "benchmarks"
    name = model.removeprefix("starter:")
    found = []
    for path in (*sorted(folder.glob("overhead*.json")), *sorted(folder.glob("rates*.json"))):
        about = read_json(path, ValueError)
        for row in _rates(path, about):
            if row["network"] == name or name.startswith(f"{row['network']}-"):
                found.append((about["device"] != "cpu", 1e6 / row["engine us"], row, about))
    if not found:
        return None, f"no committed benchmark has the speed of {model}; give rate= (--rate) to have times"
    on_gpu, rate, row, about = max(found, key=lambda f: (f[0], f[1]))
    where = about["device"] if on_gpu else f"one core ({about['processor']})"
    return (
        rate,
        f"speed of {row['network']}, {row['precision']}, {row['road']}, measured on {where}: {rate:,.0f} noisy copies a second",
    )


def _rates(path: Path, about: Any) -> list[dict[str, Any]]:
    """The rows of a benchmark of speeds, if it is one."""
    rows = about.get("rows") if isinstance(about, dict) else None
    wanted = {"network": str, "engine us": (int, float), "precision": str, "road": str}
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in wanted.items()) and row["engine us"] > 0
        for row in rows
    )
    if not good or not {"device", "processor"} <= about.keys():
        raise ValueError(
            f"{path} is no benchmark of speeds; restore it, or measure again with smoothkit bench overhead"
        )
    return rows


def _early(dataset: str, n: int, alpha: float, notes: list[str]) -> dict[float, float]:
    """Mean samples of the default sequential rule by radius, where they were measured."""
    if n != 100_000 or alpha != 0.001:
        notes.append("early stopping was measured at n=100,000 and alpha=0.001 only (bench samples)")
        return {}
    means = sequential_means(dataset)
    how = "hybrid rule, on the probabilities of published logs, mean over their sigmas"
    notes.append(f"early stopping: {how}" if means else f"early stopping was not measured on {dataset} (bench samples)")
    return means


def sequential_means(dataset: str) -> dict[float, float]:
    """Mean samples of a sequential certificate by radius, over all sigmas, as `bench samples` found them."""
    rows = read_json(data_dir() / "benchmarks" / "samples.json", ValueError, rows=list)["rows"]
    found = [r for r in rows if r["data"] == dataset and r["sigma"] == "all" and r["rule"] == "hybrid"]
    return {r["radius"]: r["mean"] for r in found}


def _bytes_of(model: str, notes: list[str]) -> int | None:
    from smoothkit import models

    try:
        loaded = models.load(model, pretrained=model.startswith("starter:"))
    except (ValueError, OSError, ImportError) as error:
        notes.append(f"size of {model} not known: {' '.join(str(error).split())[:120]}")
        return None
    return sum(x.numel() * x.element_size() for x in loaded.state_dict().values())


def bytes_per_image(n0: int, n: int, alpha: float, classes: int, *, images: int = SAMPLE) -> float:
    """Bytes that an image takes in a record, from a part of made-up votes that is written and thrown away.

    Half of the images are clear, the others have votes spread over some classes, as those of real networks are.
    """
    blocks = len(block_edges(n))
    n = min(n, MEASURED)  # blocks beyond are like those before, and 50 images of a huge n would fill the memory
    rng = np.random.default_rng(0)
    identity = Identity(
        dataset="plan", split="test", subset="all", model="plan", fingerprint="plan", num_classes=classes, sigma=0.25,
        seed=0, noise="float", precision="float32", stopping_rule=StoppingRule(n0=n0, n=n, alpha=alpha),
    )  # fmt: skip
    rows: list[Row] = []
    for i in range(images):
        rows += made_up_rows(rng, i, made_up_probabilities(rng, i, classes), n0, n)
    with tempfile.TemporaryDirectory() as folder:
        record = create_record(Path(folder) / "r", identity)
        record.append(rows, {})
        (part,) = record.parts()
        return part.stat().st_size / images * blocks / len(block_edges(n))


def made_up_probabilities(rng: np.random.Generator, i: int, classes: int) -> np.ndarray:
    """Class probabilities of image i: every second one is clear, the others are spread; float64 [classes]."""
    p = rng.dirichlet(np.full(classes, (0.5 if i % 2 else 5.0) / classes) + np.eye(classes)[int(rng.integers(classes))])
    p = 0.999 * p + 0.001 / classes  # and now and then any class
    return p / p.sum()


def made_up_rows(rng: np.random.Generator, i: int, p: np.ndarray, n0: int, n: int) -> list[Row]:
    """The blocks of an image whose votes are drawn from p, without a network."""
    known: dict[str, Any] = dict(index=i, key=str(i), image_id=i, digest=f"{i:014x}", label=int(p.argmax()))
    return [
        Row(**known, purpose=purpose, start=a, stop=b, counts=tuple(rng.multinomial(b - a, p).tolist()))
        for purpose, samples in ((SELECT, n0), (ESTIMATE, n))
        for a, b in itertools.pairwise(block_edges(samples))
    ]


def _size(number: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1_000 and len(units) > 1:
        number /= 1_000
        del units[0]
    return f"{number:.0f} bytes" if units[0] == "bytes" else f"{number:.1f} {units[0]}"
