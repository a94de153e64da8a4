"""Certificates: sound first, then equal to the published procedure."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from smoothkit import Smoothed, data, models
from smoothkit.certify import certificates, certify_votes, predict_votes
from smoothkit.certify.bounds import radius_cap
from smoothkit.records import Identity, RecordError, Row, create_record
from smoothkit.types import ABSTAIN, Certificate, StoppingRule, Votes, round_down


def votes(*counts, n=None) -> Votes:
    return Votes(np.array(counts), sum(counts) if n is None else n)


# --- soundness -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["float", "grid:255"])
@pytest.mark.parametrize("margin", [1.0, 1.5, 2.0])  # in units of sigma
def test_linear_classifier_is_certified_at_its_true_radius(linear, noise, margin):
    """A half-space at a known distance, through normalisation: never beyond it, and at least 97% of it."""
    sigma, n = 0.25, 100_000
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3 * 8 * 8, generator=generator)
    image = (torch.rand(3, 8, 8, generator=generator) * 255).round() / 255
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    per_pixel = torch.tensor(std).repeat_interleave(64)
    normalised = (image.flatten() - torch.tensor(mean).repeat_interleave(64)) / per_pixel
    distance = margin * sigma  # wanted: |w . normalised + b| / |w / std|, in pixel units
    b = float(distance * (w / per_pixel).norm() - w @ normalised)
    base = models.wrap(linear(w, b), mean=mean, std=std)
    # a batch of one may round otherwise than the engine's; the distance in float64 is the truth
    w64, n64, p64 = (
        w.double(),
        (image.double().flatten() - torch.tensor(mean).double().repeat_interleave(64)),
        per_pixel.double(),
    )
    truth = float((w64 @ (n64 / p64) + b) / (w64 / p64).norm())
    record = Smoothed(base, sigma).sample(image[None], n=n, noise=noise, progress=False)
    certificate = certificates(record).iloc[0]
    assert certificate["predict"] == 1
    assert 0.97 * truth <= certificate["radius"] <= truth


def test_false_certificates_are_at_most_alpha():
    """At p_A just where a radius becomes true, the chance of claiming it, summed over all outcomes."""
    n, alpha = 500, 0.01
    for p in (0.5, 0.8, 0.99):
        true_radius = max(0.0, stats.norm.ppf(p))
        claims = [
            certify_votes(votes(9, 1), votes(k, n - k), sigma=1.0, alpha=alpha).radius > true_radius
            for k in range(n + 1)
        ]
        assert stats.binom.pmf(np.arange(n + 1), n, p)[claims].sum() <= alpha


def test_the_selection_never_enters_the_estimate():
    certificate = certify_votes(votes(1000, 0), votes(40, 60), sigma=1.0, alpha=0.001)
    assert certificate.predicted == ABSTAIN and certificate.n_a == 40  # the class guessed, not the one that won later


def test_failed_samples_count_against_the_class():
    whole = certify_votes(votes(9, 1), votes(990, 10), sigma=1.0, alpha=0.001)
    short = certify_votes(votes(9, 1), votes(990, 0, n=1000), sigma=1.0, alpha=0.001)
    assert short.radius == whole.radius


def test_printed_radii_are_rounded_down():
    assert [round_down(0.9996), round_down(1.0), round_down(0.2496, 2)] == ["0.999", "1.000", "0.24"]
    assert round_down(0.29, 2) == "0.29" and round_down(math.nextafter(0.29, 0), 2) == "0.28"
    assert round_down(-0.1234) == "-0.124" and round_down(math.inf) == "inf"
    for value in np.random.default_rng(0).random(1000):
        assert value - 1e-3 < float(round_down(value)) <= value
    certificate = Certificate(4, 0.61999, 0.25, 100, 1000, 0.001, 0.99, 999, "grid:255", class_name="four")
    assert "size below 0.619 on the 1/255 grid moves this prediction: four" in certificate.sentence()
    assert certificate.sentence() in certificate._repr_html_()


# --- the published procedure -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "radius"), [(990, 1000, 0.4945023955), (1000, 1000, 0.6158156537), (600, 1000, 0.0320947491)]
)
def test_golden_certificates(k, n, radius):
    certificate = certify_votes(votes(0, 100), votes(n - k, k), sigma=0.25, alpha=0.001, noise="exact-grid:255")
    assert certificate.predicted == 1 and certificate.radius == pytest.approx(radius, abs=2e-10)
    assert (certificate.n0, certificate.n, certificate.norm, certificate.rule, certificate.noise) == (
        100,
        n,
        "L2",
        "fixed",
        "exact-grid:255",
    )


def test_abstention():
    certificate = certify_votes(votes(100, 0), votes(540, 460), sigma=0.25, alpha=0.001)
    assert certificate.abstained and certificate.radius == 0 and "No answer" in certificate.sentence()


@pytest.mark.parametrize(("top", "answer"), [(66, ABSTAIN), (67, 1)])
def test_predict(top, answer):
    """67 of 100 is the first to pass alpha = 0.001."""
    assert predict_votes(votes(100 - top, top), alpha=0.001) == answer


def test_predict_compares_the_two_largest():
    assert predict_votes(votes(30, 30, 40), alpha=0.001) == ABSTAIN
    assert predict_votes(votes(60, 20, 20), alpha=0.001) == 0
    assert predict_votes(votes(50, 50), alpha=0.001) == ABSTAIN
    assert predict_votes(Votes(np.array([12]), 12), alpha=0.001) == 0


def test_predict_errors_are_at_most_alpha():
    n, alpha = 200, 0.05
    for p in (0.5, 0.45, 0.3):  # class 0 is not the majority: naming it is an error
        wrong = [predict_votes(votes(k, n - k), alpha=alpha) == 0 for k in range(n + 1)]
        assert stats.binom.pmf(np.arange(n + 1), n, p)[wrong].sum() <= alpha


def test_smoothed_predict_draws_fresh_noise(starter, digits, monkeypatch):
    from smoothkit.sampling import smoothed as module

    seeds = []
    monkeypatch.setattr(module, "fresh_seed", lambda: seeds.append(len(seeds)) or 7)
    answers = Smoothed(starter, 0.25).predict(digits.take("first:20"), n=100)
    assert (answers[answers != ABSTAIN] == digits.labels[:20][answers != ABSTAIN]).mean() > 0.9
    assert len(seeds) == 1
    Smoothed(starter, 0.25).predict(digits.take("first:1"), n=100, seed=3)
    assert len(seeds) == 1


# --- tables from records ---------------------------------------------------------------------------------


def small_record(images=((5, 0, (90, 10), (9_500, 500)), (3, 1, (40, 60), (5_000, 5_000)))):
    rule = StoppingRule(n0=100, n=10_000, alpha=0.001)
    identity = Identity("d", "test", "all", "m", "f", 2, 0.5, 0, "grid:255", "float32", rule)
    record = create_record(None, identity)
    for index, label, selection, estimation in images:
        common = dict(index=index, key=str(index), image_id=index, digest="x", label=label)
        first, second = (
            (estimation[0] // 100, 100 - estimation[0] // 100),
            (estimation[0] // 10, 1_000 - estimation[0] // 10),
        )
        blocks = [first, tuple(np.subtract(second, first)), tuple(np.subtract(estimation, second))]
        record.append([Row(**common, purpose="select", start=0, stop=100, counts=selection)], {})
        for (a, b), counts in zip([(0, 100), (100, 1_000), (1_000, 10_000)], blocks, strict=True):
            record.append(
                [Row(**common, purpose="estimate", start=a, stop=b, counts=tuple(int(c) for c in counts))], {}
            )
    return record


def test_table_equals_single_certificates():
    record = small_record()
    for alpha in (None, 0.05):
        table = certificates(record, alpha=alpha)
        assert table["idx"].tolist() == [3, 5]
        for row in table.itertuples():
            selection, estimation = {3: (votes(40, 60), votes(5_000, 5_000)), 5: (votes(90, 10), votes(9_500, 500))}[
                row.idx
            ]
            noise = record.identity.noise
            single = certify_votes(selection, estimation, sigma=0.5, alpha=alpha or 0.001, noise=noise)
            assert (row.predict, row.radius, row.p_a_lower, row.n_a) == (
                single.predicted,
                single.radius,
                single.p_a_lower,
                single.n_a,
            )
    assert certificates(record)["correct"].tolist() == [False, True]


def test_fewer_samples_from_the_same_record():
    radii = [float(certificates(small_record(), n=n)["radius"].iloc[1]) for n in (100, 1_000, 10_000)]
    assert radii == sorted(radii) and 0 < radii[0] < radii[2]


def test_an_empty_record_says_so():
    with pytest.raises(RecordError, match="no complete image yet"):
        certificates(small_record(images=()))


def test_an_abstention_is_incorrect_whatever_the_label():
    table = certificates(small_record(images=((1, ABSTAIN, (50, 50), (5_000, 5_000)),)))
    assert table["predict"].tolist() == [ABSTAIN] and table["correct"].tolist() == [False]


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(alpha=95), r"alpha must lie in \(0, 1\), got 95; did you mean 0.05"),
        (dict(alpha=0.0), "alpha must lie"),
        (dict(n0=0), "n0 must be a whole number of at least 1, got 0"),
        (dict(n=9), "n=9 cannot reach alpha=0.001: .* use n of at least 10"),
        (dict(n=10.5), "n must be a whole number"),
        (dict(seed=-1), "seed must lie"),
    ],
)
def test_bad_settings_are_refused_before_sampling(settings, match, digits):
    def never(images):
        raise AssertionError("sampled")

    calls = [] if "seed" in settings else [never]
    base = calls[0] if calls else (lambda x: x.flatten(1)[:, :10])
    with pytest.raises(ValueError, match=match):
        Smoothed(base, 0.25).sample(digits.take("first:1"), **settings)


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), "0.25"])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match="sigma must be a finite number above 0"):
        Smoothed(lambda x: x, sigma)


def test_sigma_in_255ths():
    with pytest.raises(ValueError, match=r"did you mean 0\.251"):
        Smoothed(lambda x: x, 64)


def test_bad_images(digits):
    smoothed = Smoothed(lambda x: x.flatten(1)[:, :10], 0.25)
    with pytest.raises(ValueError, match="divide by 255"):
        smoothed.certify(digits[0] * 255)
    with pytest.raises(ValueError, match="must be floats"):
        smoothed.predict((digits.batch(0, 2) * 255).to(torch.uint8))


def test_votes_that_are_none():
    for counts, n in (
        (np.array([1.5, 2]), 4),
        (np.array([3, 2]), 4),
        (np.array([-1, 2]), 4),
        (np.zeros((2, 2), int), 4),
    ):
        with pytest.raises(ValueError, match="counts must"):
            Votes(counts, n)
    with pytest.raises(ValueError, match="must be equal"):
        certify_votes(votes(1, 2), votes(1, 2, 3), sigma=1, alpha=0.1)


def test_class_names_come_from_the_data_or_the_model(starter, digits):
    smoothed = Smoothed(starter, 0.25)
    (named,) = smoothed.certify(digits.take("first:1"), n=200, progress=False)
    (bare,) = smoothed.certify(data.from_arrays(digits.batch(0, 1)), n=200, progress=False)
    assert named.class_name == bare.class_name == "4"
    assert named.noise == bare.noise == "grid:256"


def test_the_cap_bounds_every_certificate(starter, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Smoothed(starter, 0.25).certify(digits.take("first:5"), n=200, progress=False)
    assert max(c.radius for c in result) <= radius_cap(200, 0.001, 0.25)


# --- floating point ---------------------------------------------------------------------------------------


def reads_its_input_off_the_rounding(images: torch.Tensor) -> torch.Tensor:
    """Class 1 if the noisy pixel could have come from 210/255 by a float32 addition: a classifier made to cheat."""
    base, u = torch.tensor(210 / 255, dtype=torch.float32), images[:, 0, 0, 0]
    one = (base + (u - base)) == u
    return torch.stack([~one, one], dim=1).float()


def one_pixel(value: int) -> torch.Tensor:
    return torch.full((1, 1, 1), value, dtype=torch.float32) / 255


def class_one_share(value: int, noise: str) -> float:
    record = Smoothed(reads_its_input_off_the_rounding, 0.25).sample(
        one_pixel(value), n=20_000, noise=noise, progress=False
    )
    return record.votes()["counts_estimation"][0][1] / 20_000


def test_float_noise_leaks_the_image_and_certifies_falsely():
    """The counter-example of Voráček and Hein (ICLR 2023), one pixel: certified far beyond where the class changes."""
    certificate = Smoothed(reads_its_input_off_the_rounding, 0.25).certify(
        one_pixel(210), n=20_000, progress=False, noise="float"
    )[0]
    distance = (210 - 50) / 255
    assert certificate.predicted == 1 and certificate.radius > distance
    assert class_one_share(50, "float") < 0.51  # within the certified radius class 1 no longer leads


def test_grid_noise_is_sound_on_the_same_classifier():
    """On the grid the classifier sees the same values from every pixel: where it is certified, the class holds."""
    smoothed = Smoothed(reads_its_input_off_the_rounding, 0.25)
    for value in (210, 100, 50):
        certificate = smoothed.certify(one_pixel(value), n=20_000, progress=False, noise="grid:255")[0]
        if certificate.abstained:
            continue
        reach = int(certificate.radius * 255)
        for other in {max(0, value - reach), min(255, value + reach), max(0, value - reach // 2)}:
            share = class_one_share(other, "grid:255")
            assert (share if certificate.predicted == 1 else 1 - share) > 0.49
