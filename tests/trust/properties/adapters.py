"""Adapters and certifying networks."""

import functools
import json
from collections.abc import Callable

import torch
from hypothesis import strategies as st

from properties.inputs import (
    Constant,
    eight,
    few,
    folder,
    holds,
    logit_values,
    mostly,
    nested,
    numbers,
    refused,
    shares,
    sigmas,
    small,
    some_of,
    texts,
    vit,
)
from smoothbook import adapters
from smoothbook.adapters.base import read_config


def answers_alike(make: Callable[[], torch.nn.Module], num_classes: int | None) -> torch.nn.Module:
    """An adapted model answers in the shape that was asked for, with finite logits."""
    made = make()
    with torch.no_grad(), refused(AssertionError):  # timm's word for images of another size than a network's
        logits = made.eval()(eight().batch(0, 2))
    assert logits.shape == (2, num_classes or 3) and bool(logits.isfinite().all())
    assert isinstance(adapters.trainable(made), adapters.Trainable)
    adapters.set_train_mode(made, True)
    return made


heads = mostly(st.just("trained"), st.sampled_from(["frozen", "x"]))
new_heads = mostly(st.none(), small)


@holds(
    mostly(st.just(2), st.integers(-1, 20)),
    mostly(st.none(), numbers),
    mostly(
        st.sampled_from(["blocks", "qkv", "attention", "convolutions", ".*", ".*qkv"]),
        st.one_of(texts, st.sampled_from(["(", "head"])),
    ),
    mostly(few, shares),
    heads,
    new_heads,
    mostly(st.just("one"), texts),
    share=0.15,
)
def lora_of_any_settings(rank, alpha, targets, dropout, head, num_classes, name):
    known = dict(
        rank=rank, alpha=alpha, targets=targets, dropout=dropout, head=head, num_classes=num_classes, name=name
    )
    made = answers_alike(lambda: adapters.lora(vit(), **known), num_classes)
    assert isinstance(made, adapters.LoraClassifier)


@holds(
    mostly(st.sampled_from(["houlsby", "pfeiffer", "parallel"]), st.just("x")),
    mostly(st.none(), st.integers(-1, 9)),
    mostly(st.just(1.0), numbers),
    mostly(few, shares),
    heads,
    new_heads,
    share=0.15,
)
def bottlenecks_of_any_settings(place, width, scale, dropout, head, num_classes):
    known = dict(place=place, width=width, scale=scale, dropout=dropout, head=head, num_classes=num_classes)
    assert isinstance(answers_alike(lambda: adapters.bottleneck(vit(), **known), num_classes), adapters.Adapted)


@holds(mostly(st.integers(1, 9), st.integers(-1, 12)), st.booleans(), mostly(few, shares), heads, new_heads, share=0.15)
def prompts_of_any_settings(length, deep, dropout, head, num_classes):
    known = dict(length=length, deep=deep, dropout=dropout, head=head, num_classes=num_classes)
    answers_alike(lambda: adapters.prompts(vit(), **known), num_classes)


@holds(
    mostly(st.sampled_from(["resnet", "vit"]), st.just("x")),
    mostly(
        st.just({}),
        st.dictionaries(
            st.sampled_from(["width", "depth", "stages", "patch_size", "image_size", "heads", "z"]), small, max_size=3
        ),
    ),
    st.booleans(),
    st.booleans(),
    mostly(st.sampled_from(["base", "new"]), st.just("x")),
    new_heads,
    mostly(st.none(), small),
    share=0.15,
)
def certifying_adapters_of_any_settings(adapter, settings, use_features, use_adapter, head, num_classes, channels):
    wanted = {"width": 4, "depth": 1} | ({"stages": 1} if adapter == "resnet" else {"image_size": 8}) | settings
    known = dict(
        adapter=adapter, adapter_settings=wanted, use_features=use_features, use_adapter=use_adapter, head=head,
        num_classes=num_classes, channels=channels,
    )  # fmt: skip
    made = answers_alike(lambda: adapters.certifying(vit(), **known), num_classes)
    assert isinstance(made, adapters.CertifyingClassifier)


@functools.cache
def member(seed: int, use_adapter: bool = True) -> adapters.CertifyingClassifier:
    small_net = {"width": 4, "depth": 1, "stages": 1}
    return adapters.certifying(vit(), adapter_settings=small_net, seed=seed, use_adapter=use_adapter)


@holds(
    mostly(st.just([0.25, 0.5]), st.lists(sigmas, max_size=3)),
    mostly(st.sampled_from(["logits", "features", "noise"]), st.just("x")),
    st.booleans(),
    sigmas,
    share=0.15,
)
def ensembles_of_any_members(scales, design, whole, sigma):
    members = {s: member(i, whole or i > 0) for i, s in enumerate(scales)}
    answers_alike(lambda: adapters.ensemble(members, design=design), None)
    each = adapters.PerSigma(members)
    assert isinstance(each, adapters.PerSigma) and each.at(sigma) is members[sigma]


@holds(
    mostly(st.just([1, 8, 8]), st.lists(st.sampled_from([1, 8, 7, 4, 0, -2, 16]), min_size=2, max_size=4)),
    mostly(st.sampled_from(["features", "pixels", "both"]), st.just("x")),
    mostly(st.just(0.5), numbers),
    mostly(st.just(32), st.integers(-1, 40)),
    mostly(st.none(), st.lists(small, max_size=2).map(tuple)),
    mostly(st.just("logits"), st.sampled_from(["probabilities", "x"])),
    logit_values,
    share=0.15,
)
def coordinators_of_any_settings(shape, sees, strength, cube, widths, returns, values):
    box = adapters.BlackBox(Constant(values), returns=returns, model_id="constant")
    made = adapters.coordinator(
        box,
        vit(),
        image_shape=shape,
        sees=sees,
        strength=strength,
        cube=cube,
        widths=widths,
    )
    assert isinstance(made, adapters.Coordinator)
    with refused(adapters.BlackBoxError):
        assert made(eight().batch(0, 2)).shape == (2, len(values))


CONFIG = {
    "kind": "bottleneck", "settings": {"place": "parallel", "width": 2, "head": "trained"}, "class_names": [],
    "base": {"name": "b", "fingerprint": "f"},
}  # fmt: skip


@holds(
    st.one_of(
        nested("kind", "settings", "base"), some_of(CONFIG, odd=nested("head", "fingerprint", "members", "names"))
    ),
    st.sampled_from(
        [
            "lora",
            "bottleneck",
            "prompts",
            "certifying",
            "certifying-ensemble",
            "certifying-per-sigma",
            "coordinator",
            "",
        ]
    ),
)
def adapters_of_any_config(content, kind):
    if kind and isinstance(content, dict):
        content["kind"] = kind
    with folder() as place:
        (place / "adapter.json").write_text(json.dumps(content))
        assert read_config(place) == content
        adapters.load(place, vit())
        raise AssertionError("no weights were there")
