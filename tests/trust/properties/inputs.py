"""What the properties share: the registry, strategies for usual and odd values, small objects made once."""

import contextlib
import functools
import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoothkit import data, models
from smoothkit.sampling.run import collect_votes
from smoothkit.types import ABSTAIN, StoppingRule

REFUSED = (ValueError, OSError)
TRIED, REFUSALS = Counter(), Counter()
PROPERTIES: dict[str, Callable] = {}
# without deadline: the machine may be busy; the same examples every time
QUICK = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def holds(*strategies, share: float = 1.0):
    """A property of a function; the fuzzer tries `share` of the usual number of inputs."""

    def register(check: Callable) -> Callable:
        def counted(drawn: tuple) -> None:
            TRIED[check.__name__] += 1
            try:
                check(*drawn)
            except REFUSED as error:
                REFUSALS[check.__name__] += 1
                assert str(error).strip(), f"{type(error).__name__} without a word"

        def run(examples: int) -> None:
            settings(max_examples=max(5, int(share * examples)), database=None, **QUICK)(
                given(st.tuples(*strategies))(counted)
            )()

        PROPERTIES[check.__name__] = run
        return check

    return register


def odd_floats(**limits):
    return st.one_of(
        st.floats(**limits), st.sampled_from([0.0, -0.0, 1.0, 0.5, math.nan, math.inf, -math.inf, 1e-320, 1e308])
    )


sizes = st.integers(100, 3_000)  # what is mostly allowed, beside what is odd
wholes = st.one_of(sizes, sizes, st.integers(-3, 99), st.sampled_from([10**6, 2**31 - 1, 2**31, 2**53, 2**63, 10**30]))
usual = st.sampled_from([0.05, 0.001, 1e-9])
alphas = st.one_of(usual, usual, usual, odd_floats(min_value=-1, max_value=100))
levels = st.sampled_from([0.12, 0.25, 1.0])
sigmas = st.one_of(levels, levels, levels, odd_floats(min_value=-1, max_value=300))
names = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
numbers = odd_floats(min_value=-2, max_value=300)
shares = st.one_of(st.floats(0, 1), odd_floats(min_value=-0.5, max_value=1.5))
few = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def mostly(usual, odd):
    """What would do three times of four, so that several arguments together still do now and then."""
    return st.one_of(usual, usual, usual, odd)


halves = mostly(st.floats(0.5, 0.9), shares)  # p0 of a cascade
float32s = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e-38, 2.0**127]))
small = st.integers(-2, 9)
texts = st.text(max_size=20)
scalars = st.one_of(st.none(), st.booleans(), wholes, odd_floats(), st.text(max_size=6))


def nested(*keys: str):
    """JSON values, often with these keys."""
    return st.recursive(
        scalars,
        lambda x: st.one_of(
            st.lists(x, max_size=3),
            st.dictionaries(st.one_of(st.sampled_from(keys), st.text(max_size=4)), x, max_size=5),
        ),
        max_leaves=8,
    )


def some_of(right: dict, keys: tuple[str, ...] = (), odd=scalars):
    """Settings that would do, with some replaced by what may not."""
    changed = st.dictionaries(st.sampled_from([*right, *keys]), odd, max_size=2)
    return st.builds(lambda change: {**right, **change}, changed)


@contextlib.contextmanager
def refused(*kinds: type[Exception]):
    """Errors of other kinds that a function states as its own count as a refusal, if they say something."""
    try:
        yield
    except kinds as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(place)


class Halves(torch.nn.Module):
    """Class 1 where the mean of the pixels passes one half, of two classes; differentiable."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-side, side], dim=1)


class Constant(torch.nn.Module):
    """The same logits for every image: as many classes as there are values, and any values."""

    def __init__(self, values) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.values.expand(len(images), -1)


@functools.cache
def eight() -> data.Images:
    """Eight grey 8x8 images of three classes, of no test split."""
    pixels = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    return data.from_arrays(pixels, np.arange(8) % 3, class_names=("a", "b", "c"), grid=255)


@functools.cache
def patches() -> data.Images:
    """Six grey 2x2 images on both sides of one half."""
    values = np.rint(255 * np.linspace(0.1, 0.9, 6)) / 255
    pixels = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(6, 1, 2, 2).contiguous()
    return data.from_arrays(pixels, (values > 0.5).astype(np.int64), class_names=("dark", "bright"), grid=255)


@functools.cache
def patch_record(sigma: float = 0.25, n: int = 300):
    return collect_votes(
        Halves(), patches(), sigma=sigma, stopping_rule=StoppingRule(50, n, 0.05), model_id="halves", progress=False
    )


@functools.cache
def vit() -> models.BaseClassifier:
    """A timm vision transformer of one block on 8x8 images; small enough to copy for every example."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=4,
            in_chans=1,
            depth=1,
            embed_dim=8,
            num_heads=2,
            num_classes=3,
        )
    return models.wrap(network, mean=(0.5,), std=(0.5,), channels=1, size=(8, 8), name="one-block")


def table_of(radius, predict, label) -> pd.DataFrame:
    n = len(radius)
    predict, label = np.asarray(predict[:n], dtype=np.int64), np.asarray(label[:n], dtype=np.int64)
    return pd.DataFrame(
        {
            "idx": np.arange(n),
            "label": label,
            "predict": predict,
            "radius": np.asarray(radius, dtype=np.float64),
            "correct": (predict == label) & (predict != ABSTAIN),
            "sigma": 0.25,
            "key": [str(i) for i in range(n)],
            "image_id": np.arange(n),
        }
    )


classes = st.lists(st.integers(-1, 2), min_size=6, max_size=6)
right_tables = st.builds(table_of, st.lists(st.floats(0, 3), min_size=4, max_size=4), classes, classes)
odd_tables = st.builds(table_of, st.lists(odd_floats(min_value=-1, max_value=3), max_size=6), classes, classes)
certificate_tables = mostly(right_tables, odd_tables)
logit_values = st.lists(float32s, min_size=1, max_size=3)


def as_yaml(content) -> str:
    return yaml.safe_dump(content, allow_unicode=True)


@functools.cache
def kept_record() -> dict:
    """What a small record of `patches` on the disk says of itself, with its parts' bytes."""
    with folder() as place:
        rule = StoppingRule(50, 300, 0.05)
        how = dict(sigma=0.25, stopping_rule=rule, model_id="halves", progress=False, batch=64, compile=False)
        collect_votes(Halves(), patches(), out=place / "r", **how)
        about = json.loads((place / "r" / "run.json").read_text())
        return about | {"parts": {p.name: p.read_bytes() for p in (place / "r" / "parts").iterdir()}}


def copy_record(place: Path, about: dict | None = None) -> Path:
    known = kept_record()
    (place / "parts").mkdir(parents=True)
    for name, content in known["parts"].items():
        (place / "parts" / name).write_bytes(content)
    about = {k: v for k, v in known.items() if k != "parts"} if about is None else about
    (place / "run.json").write_text(json.dumps(about))
    return place
