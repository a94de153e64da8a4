"""Images, noise, counting and models by name."""

import contextlib
import functools
import io
import math

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import float32s, folder, holds, mostly, names, sigmas, small, texts, wholes
from smoothkit import Purpose, data, models, noisy_copies
from smoothkit.kernels import noise_exact
from smoothkit.kernels.noise import backend, noisy_rows, standard_normal, standard_normal_reference
from smoothkit.kernels.votes import add_votes, count_votes_reference


@holds(
    npst.arrays(
        np.float32,
        npst.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.one_of(st.floats(-2, 2, width=32), st.sampled_from([np.nan, np.inf, -np.inf])),
    )
)
def votes_are_counted_as_defined(logits):
    logits = torch.from_numpy(logits)
    votes = torch.zeros(1, logits.shape[1], dtype=torch.int64)
    add_votes(votes, logits, torch.zeros(len(logits), dtype=torch.int64))
    assert torch.equal(votes[0], count_votes_reference(logits)) and votes.sum() <= len(logits)


greys = npst.arrays(np.float32, (2, 1, 2, 2), elements=st.integers(0, 255).map(lambda k: np.float32(k / 255)))
pixels = st.one_of(
    greys,
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.uint8, np.int64]),
        npst.array_shapes(min_dims=0, max_dims=5, max_side=3),
    ),
)


@holds(
    pixels,
    st.one_of(st.none(), st.just([0, 1]), st.lists(st.integers(-2, 3), max_size=3)),
    st.sampled_from([None, 255, 256, 1, 0]),
)
def images_from_arrays(values, labels, grid):
    images = data.from_arrays(torch.from_numpy(values), None if labels is None else np.array(labels), grid=grid)
    assert len(images) == len(values) and torch.equal(images.batch(), torch.from_numpy(values).float())


@holds(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [
                "first:0",
                "every:2",
                "range:1:3",
                "range:3:1",
                "classes:0-0",
                "classes:1-0",
                "first:99999999999999999999",
                "all",
            ]
        ),
    )
)
def subsets(rule):
    images = data.from_arrays(
        torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)), np.array([0, 0, 1, 1, 1])
    )
    chosen = images.take(rule)
    assert 0 < len(chosen) <= 5 and set(chosen.ids) <= set(images.ids)


@holds(
    st.one_of(names, st.sampled_from(["digits", "digit", "folder:", "parquet:", "folder:/no/such", "imagenet"])),
    st.sampled_from(["test", "train", "", "x"]),
)
def data_sets_by_name(name, split):
    assert len(data.load(name, split=split)) > 0


@holds(st.integers(1, 40), st.integers(-1, 2**64), st.integers(0, 2**56 - 1), st.integers(0, 5), share=0.5)
def noise_is_what_it_is_defined_to_be(size, seed, image, start):
    known = dict(seed=seed, purpose=Purpose.ESTIMATE, image_id=image, start=start, stop=start + 2)
    assert np.array_equal(standard_normal(size, **known), standard_normal_reference(size, **known))


@holds(sigmas, st.sampled_from([None, 255, 0, -1]), st.integers(-2, 3), st.integers(-2, 4), share=0.5)
def noisy_copies_are_finite(sigma, grid, start, stop):
    made = noisy_copies(
        torch.full((1, 2, 2), 0.5),
        sigma=sigma,
        seed=0,
        purpose=Purpose.SELECT,
        image_id=1,
        start=start,
        stop=stop,
        grid=grid,
    )
    assert made.shape == (stop - start, 1, 2, 2) and bool(made.isfinite().all())


@holds(
    st.one_of(
        names,
        st.sampled_from(
            ["starter:x", "starter:../digits-vit-0.25", "local-dir:/", "weights.pth", "local-dir:x.bin", "resnt18"]
        ),
    ),
    share=0.2,
)
def models_by_name(name):
    models.load(name, pretrained=False)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    from PIL import Image

    found = []
    for kind in ("png", "gif", "bmp", "jpeg", "tiff", "ppm", "webp"):
        file = io.BytesIO()
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
        found.append(file.getvalue())
    return tuple(found)


@st.composite
def damaged_pictures(draw):
    content = bytearray(draw(st.sampled_from(pictures())))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@holds(
    st.one_of(st.binary(max_size=80), damaged_pictures(), st.sampled_from(range(7)).map(lambda i: pictures()[i])),
    mostly(st.none(), st.sampled_from([1, 8, 0, -3, 10**30])),
    st.sampled_from([1, 3, 3, 2]),
)
def pictures_of_any_bytes(content, size, channels):
    with folder() as place:
        (place / "bild ∞.png").write_bytes(content)
        (image,) = data.load_image(place / "bild ∞.png", size=size, channels=channels)
        assert len(image) == channels and bool(((image >= 0) & (image <= 1)).all())
        assert size is None or image.shape[1:] == (size, size)


@holds(st.one_of(st.binary(max_size=200), texts.map(str.encode)))
def parquet_files_of_any_bytes(content):
    with folder() as place:
        (place / "x.parquet").write_bytes(content)
        assert len(data.load(f"parquet:{place / 'x.parquet'}").batch()) > 0


rules = st.one_of(
    texts,
    st.builds(
        lambda k, *v: ":".join([k, *map(str, v)]), st.sampled_from(["first", "every", "range", "all"]), wholes, wholes
    ),
    st.builds(lambda a, b: f"classes:{a}-{b}", wholes, wholes),
    st.builds("{}:{}".format, st.sampled_from(["first", "every"]), wholes),
)


@holds(rules, st.one_of(small, st.integers(0, 50)))
def subset_rules(rule, n):
    with contextlib.suppress(ValueError):
        first, last = data.class_range(rule, n)
        assert 0 <= first <= last < n
    chosen = data.subset_indices(rule, n)
    assert len(chosen) and (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < n


@holds(
    mostly(
        npst.arrays(
            np.float32, npst.array_shapes(min_dims=4, max_dims=4, max_side=3), elements=st.floats(0, 1, width=32)
        ),
        npst.arrays(
            st.sampled_from([np.float32, np.float16, np.int64]), npst.array_shapes(min_dims=0, max_dims=5, max_side=3)
        ),
    ),
    st.booleans(),
)
def images_that_pass_the_check(values, check_range):
    data.check_images(torch.from_numpy(values), check_range=check_range)
    assert values.ndim == 4 and values.size and not np.isnan(values).any()
    assert not check_range or ((values >= 0) & (values <= 1)).all()


@holds(
    greys, sigmas, st.sampled_from([255, 255, 256, 1, 0, -1, 10**9]), st.integers(-2, 3), st.integers(-2, 4), share=0.1
)
def exact_noise(images, sigma, grid, start, stop):
    known = dict(sigma=sigma, seed=0, purpose=Purpose.SELECT, image_id=1, start=start, stop=stop, grid=grid)
    copies, failed = noise_exact.exact_noisy_copies(torch.from_numpy(images[0]), **known)
    assert copies.shape == (stop - start, *images.shape[1:]) and bool(copies[~failed].isfinite().all())
    steps = copies[~failed].double() * grid
    assert float((steps - steps.round()).abs().max() if len(steps) else 0) < 1e-3


@holds(
    st.integers(0, 3),
    st.integers(1, 3),
    mostly(st.integers(-1, 0), st.integers(-2, 3)),
    mostly(st.integers(0, 2**40 - 1), st.integers(-2, 2**41)),
    float32s,
    st.sampled_from([0, 255, -1, 2**24]),
)
def noise_of_rows(batch, number, index, sample, scale, grid):
    rows = torch.tensor([[index], [5], [sample]]).repeat(1, batch)
    out = torch.full((batch, 1, 2, 2), math.nan)
    noisy_rows(out, torch.full((number, 1, 2, 2), 0.5), rows, torch.full((batch,), scale), 0, grid)
    assert bool(out.isfinite().all()) or not abs(scale) < 1e30


@holds(wholes)
def the_road_of_the_noise(pixels):
    assert backend(pixels) in ("numba", "numpy")
