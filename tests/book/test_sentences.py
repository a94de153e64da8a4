"""Sentences of notebooks 20 to 23 that state an order or a number, held against the committed records."""

import functools

import pandas as pd
import pytest

from smoothbook import tables
from smoothbook.figures.studies import envelope_points
from smoothkit.reading import certified_accuracy

RADII = (0.0, 0.25, 0.5)
SIGMAS = (0.25, 0.5)


@functools.cache
def compared(table: str, reference: str, names: tuple[str, ...] | None = None) -> pd.DataFrame:
    found = tables.open(table).compare(reference, RADII, names, shared=names is not None)
    return found.set_index(["row", "what"])


def verdicts(table: str, reference: str, row: str, names: tuple[str, ...] | None = None) -> dict[str, str]:
    """Of the row with this title at radius 0, 0.25, 0.5 and in ACR: +, - or = for not told apart."""
    signs = {"above": "+", "below": "-", "not told apart": "="}
    return {what: signs[verdict] for what, verdict in compared(table, reference, names).verdict[row].items()}


def difference(table: str, reference: str, row: str, what: str, names: tuple[str, ...] | None = None) -> float:
    return compared(table, reference, names).difference[row, what]


# --- 20, noise training ------------------------------------------------------------------------------


def test_noise_training_at_a_quarter():
    of = functools.partial(verdicts, "noise-training", "gaussian-0.25")
    assert of("SmoothAdv") == {"0": "-", "0.25": "+", "0.5": "+", "ACR": "+"}
    assert of("Consistency") == {"0": "-", "0.25": "=", "0.5": "+", "ACR": "+"}
    assert of("Stability") == {"0": "=", "0.25": "+", "0.5": "+", "ACR": "+"}
    assert set(of("MACER").values()) == {"-"} and set(of("Gaussian, another seed").values()) == {"="}
    seed = abs(difference("noise-training", "gaussian-0.25", "Gaussian, another seed", "ACR"))
    for title in ("SmoothAdv", "Consistency", "Stability", "MACER"):
        assert abs(difference("noise-training", "gaussian-0.25", title, "ACR")) > 10 * seed
    assert verdicts("noise-training", "clean-base-0.25", "clean control") == {
        "0": "+",
        "0.25": "=",
        "0.5": "=",
        "ACR": "+",
    }
    to_clean = compared("noise-training", "clean-base-0.25").difference.unstack()["0.25"].drop("clean control")
    among = (
        compared("noise-training", "gaussian-0.25").difference.unstack()["0.25"].drop(["clean base", "clean control"])
    )
    assert to_clean.min() > among.abs().max()  # the largest step is from clean training to any noise


def test_noise_training_at_a_half():
    of = functools.partial(verdicts, "noise-training", "gaussian-0.50")
    assert of("SmoothAdv")["0.5"] == of("Consistency")["0.5"] == "+" and "+" not in of("Stability").values()
    assert difference("noise-training", "gaussian-0.50", "Gaussian, another seed", "ACR") == pytest.approx(
        -0.008, abs=5e-4
    )
    table = tables.open("noise-training")
    assert 5.5 < table["gaussian-again-0.50"].card.seconds / table["gaussian-0.50"].card.seconds < 6.5
    for name in ("clean-base-0.50", "clean-control-0.50"):
        at_zero, at_quarter = certified_accuracy(table[name].certificates, [0.0, 0.25])
        assert at_zero < 0.2 and at_quarter < 0.01


# --- 21, PEFTSmoothing -------------------------------------------------------------------------------


def test_peft_on_digits():
    for s in ("0.25", "0.50"):
        assert verdicts("peft", f"full-{s}", "LoRA, rank 16")["0.25"] == "="
        for title in ("adapters, parallel", "adapters, Houlsby", "prompts, deep", "prompts, shallow"):
            assert verdicts("peft", f"lora-4-{s}", title)["ACR"] == "-"
            assert verdicts("peft", f"lora-16-{s}", title)["ACR"] == "-"
    for title in ("adapters, parallel", "adapters, Houlsby", "prompts, deep"):  # further below at the larger noise
        below = [difference("peft", f"lora-16-{s}", title, "0.25") for s in ("0.25", "0.50")]
        assert below[1] < below[0] < 0
    assert verdicts("peft", "clean-base-0.50", "prompts, deep") == {"0": "+", "0.25": "=", "0.5": "=", "ACR": "+"}
    assert verdicts("peft", "clean-base-0.25", "clean control")["0.25"] == "="


def test_lora_is_within_five_points_over_three_seeds():
    table = tables.open("peft")
    for s, two_points in (("0.25", -0.02), ("0.50", 0.02)):
        pairs = {
            seed: (table[f"lora-16{seed}-{s}"].certificates, table[f"full{seed}-{s}"].certificates)
            for seed in ("", "-again", "-third")
        }
        mean = tables.compare_over_seeds(pairs, 0.25).iloc[-1]
        assert mean.seed == "mean" and mean.low > -0.05
        assert mean.difference == pytest.approx(two_points, abs=0.005) and mean.low * mean.high > 0


def test_the_black_box():
    for s, clipped in (("0.25", "+"), ("0.50", "=")):
        assert verdicts("peft", f"clipped-base-{s}", "black box, per image")["0.25"] == clipped
        assert verdicts("peft", f"clean-base-{s}", "black box, per image")["0.25"] == "+"
        assert verdicts("peft", f"lora-16-{s}", "black box, per image")["ACR"] == "-"
    assert verdicts("peft", "clipped-base-0.50", "black box, per image")["0"] == "+"
    assert 0.02 < difference("peft", "clean-base-0.50", "black box, per image", "0.25") < 0.05


def test_peft_on_photographs():
    name = "cifar10-peft:reduced"
    frame = tables.open(name).frame(RADII).set_index("title")
    assert frame.ACR.nlargest(2).index.tolist() == ["full noise training", "LoRA, rank 16"]
    assert frame.trained["LoRA, rank 16"] / frame.parameters["LoRA, rank 16"] == pytest.approx(1 / 8, abs=0.02)
    told_apart = {
        t
        for t in frame.index.drop(["clean base", "clipped base"])
        if "+" in verdicts(name, "clean-base-0.25", t).values()
    }
    assert told_apart == {"full noise training", "LoRA, rank 16"}
    assert all(tables.open(name).rows[row].epochs == 2 for row in frame.name if row.startswith(("full", "lora", "par")))


# --- 22, certifying adapters -------------------------------------------------------------------------

KINDS = ("clean-base", "head", "caf", "caf-smoothadv", "alone", "full", "lora-1", "lora-16")
CORE = tuple(f"{kind}-0.25" for kind in KINDS)


def test_frozen_features_add_nothing_on_digits():
    of = functools.partial(verdicts, "certifying", names=CORE)
    assert of("alone-0.25", "CAF") == {"0": "=", "0.25": "=", "0.5": "=", "ACR": "-"}
    for title in ("full noise training", "LoRA, rank 16"):
        assert of("caf-0.25", title)["0.25"] == of("caf-0.25", title)["ACR"] == "-"
        assert of("alone-0.25", title)["0.25"] == of("alone-0.25", title)["ACR"] == "-"
    assert of("alone-0.25", "CAF, SmoothAdv")["0.5"] == "+"
    assert difference("certifying", "caf-0.25", "head only", "0.25", CORE) < -0.5
    assert difference("certifying", "caf-0.25", "LoRA, rank 1", "0.25", CORE) < -0.2


def test_nothing_is_enhanced():
    names = ("noise-base-0.25", "noise-caf-0.25", "noise-full-0.25")
    for title in ("CAF on the noise-trained base", "noise-trained base, trained on"):
        assert set(verdicts("certifying", names[0], title, names).values()) == {"="}


def at_level(s: float) -> dict[str, str]:
    """Verdicts against the member trained at 0.5, by title and what, for ensembles certified at s."""
    own = {0.12: "member-0.12", 0.25: "caf-0.25", 0.5: "caf-0.50"}
    members = {k: own[s] if k == s else f"member-{k:.2f}-at-{s:.2f}" for k in own}
    kinds = ("ensemble-logits", "ensemble-features", "ensemble-noise", "one-for-all")
    names = (*members.values(), *(f"{kind}-{s:.2f}" for kind in kinds))
    return compared("certifying", members[0.5], names)


def test_the_member_of_the_largest_noise_covers_all_levels():
    found = {s: at_level(s) for s in (0.12, 0.25, 0.5)}
    verdict = {s: f.verdict for s, f in found.items()}
    mean, features, noise, one = (
        "A, mean of logits",
        "B, sum of features",
        "C, by estimated noise",
        "one adapter, all levels",
    )
    for s, member in ((0.12, "member 0.12"), (0.25, "CAF")):
        assert "above" not in verdict[s][member].drop("ACR").values
    for member in ("member 0.12", "member 0.25"):
        assert verdict[0.5][member, "0.25"] == verdict[0.5][member, "ACR"] == "below"
    assert found[0.5].difference[mean, "0.25"] < -0.3
    assert verdict[0.25][mean, "ACR"] == verdict[0.25][mean, "0.5"] == "below"
    assert [verdict[s][features, "ACR"] for s in found] == ["above", "not told apart", "below"]
    assert [verdict[s][one, "ACR"] for s in found] == ["not told apart", "below", "below"]
    for title in (features, one):
        assert {verdict[s][title, "0.25"] for s in found} == {"not told apart"}
    assert all((found[s].difference[noise] == 0).all() for s in found)
    assert max(f.difference[:, "ACR"].max() for f in found.values()) < 0.01


def test_the_sweep():
    names = tuple(f"sweep-{w}-{d}-{r}" for w in (4, 16) for d in (1, 2) for r in ("low", "high"))
    frame = compared("certifying", "caf-0.25", names).verdict.unstack()
    for depth in (1, 2):
        assert frame.loc[f"width 4, depth {depth}, rate 0.003", "0.25"] == "below"
        assert frame.loc[f"width 4, depth {depth}, rate 0.03", "ACR"] == "below"
        assert frame.loc[f"width 16, depth {depth}, rate 0.003", "ACR"] == "below"
        assert frame.loc[f"width 16, depth {depth}, rate 0.03", "ACR"] == "not told apart"
    assert set(frame.filter(like="width 16", axis=0)["0.25"]) == {"not told apart"}
    for shallow, rate in ((s, r) for s in ("sweep-4-1", "sweep-16-1") for r in ("low", "high")):
        deep = f"{shallow[:-1]}2-{rate}"
        found = tables.open("certifying").compare(f"{shallow}-{rate}", [0.25], [deep], shared=True)
        assert set(found.verdict) == {"not told apart"}, deep


def test_certifying_adapters_on_photographs():
    of = functools.partial(verdicts, "cifar10-certifying:reduced", "adapter-alone-0.25")
    assert of("certifying adapter") == {"0": "+", "0.25": "=", "0.5": "-", "ACR": "="}
    assert set(of("head only").values()) == {"="} and of("full noise training")["0.25"] == "+"
    assert verdicts("cifar10-certifying:reduced", "full-0.25", "certifying adapter")["0.25"] == "-"


# --- 23, noise pretraining ---------------------------------------------------------------------------


def pretraining(reference: str, row: str, s: float) -> dict[str, str]:
    made = [n for n in tables.open("noise-pretraining") if n.endswith(f"{s:.2f}") and not n.startswith("pre-")]
    return verdicts("noise-pretraining", f"{reference}-{s:.2f}", row, tuple(made))


def test_a_clean_fine_tuning_keeps_a_part():
    to_clean = {s: pretraining("clean-clean", "mixture → clean", s) for s in (*SIGMAS, 1.0)}
    assert to_clean[0.25]["0"] == to_clean[0.25]["0.25"] == "+" and set(to_clean[0.5].values()) == {"+"}
    assert to_clean[1.0] == {"0": "=", "0.25": "+", "0.5": "+", "ACR": "+"}
    for s in (*SIGMAS, 1.0):
        again = pretraining("mixture-clean", "mixture → one σ", s)
        assert again["0.25"] == again["ACR"] == "+"
    gains = [difference_of("mixture-clean", "mixture → one σ", "0.25", s) for s in SIGMAS]
    assert gains[1] > gains[0]


def difference_of(reference: str, row: str, what: str, s: float) -> float:
    made = [n for n in tables.open("noise-pretraining") if n.endswith(f"{s:.2f}") and not n.startswith("pre-")]
    return difference("noise-pretraining", f"{reference}-{s:.2f}", row, what, tuple(made))


@pytest.mark.parametrize("s", SIGMAS)
def test_other_fine_tunings(s):
    of = functools.partial(pretraining, "mixture-clean", s=s)
    assert set(of("clean → one σ").values()) == {"-"}
    assert set(of("mixture → clean, LoRA").values()) == {"="}
    assert of("mixture → clean, head")["0.25"] == "-" and of("mixture → clean, head")["0.5"] == (
        "=" if s < 0.5 else "+"
    )
    for reference in ("mixture-sigma", "mixture-mixture", "mixture-clean", "fixed-clean", "grid-clean", "clean-sigma"):
        scratch = pretraining(reference, "from scratch, mixture", s)
        assert scratch["ACR"] == scratch["0.5"] == "+", reference
    level = pretraining("mixture-sigma", "mixture → mixture", s)
    assert level["0.25"] == "=" and level["ACR"] == ("=" if s < 0.5 else "-")


def test_what_the_pretraining_mixed():
    for title in ("σ = 0.5 → clean", "grid → clean"):
        assert -0.03 < difference_of("mixture-clean", title, "ACR", 0.25) < 0.03
        at_half = pretraining("mixture-clean", title, 0.5)
        assert at_half["0"] == "+" and at_half["0.5"] == "-"
    assert set(pretraining("mixture-clean", "σ = 0.5 → clean", 0.25).values()) == {"="}


def test_the_envelope_of_a_model_per_sigma_lies_above():
    table = tables.open("noise-pretraining")
    rows = {
        way: {s: table[f"{way}-{s:.2f}"].certificates for s in (*SIGMAS, 1.0)}
        for way in ("mixture-clean", "mixture-sigma")
    }
    points = envelope_points(rows)
    one, many = (points[points.row == way].set_index("radius").certified_accuracy for way in rows)
    at = one.index.union(many.index)
    one, many = (curve.reindex(at, method="bfill").fillna(0) for curve in (one, many))  # step curves, left-continuous
    assert (many >= one).mean() > 0.95 and many.sum() > one.sum()


def test_noise_pretraining_on_photographs():
    of = functools.partial(verdicts, "cifar10-noise-pretraining:reduced")
    whole = of("clean-then-clean-0.25", "mixture, then clean")
    assert set(whole.values()) == {"="}
    for what in ("0", "ACR"):
        assert difference("cifar10-noise-pretraining:reduced", "clean-then-clean-0.25", "mixture, then clean", what) > 0
    head = of("clean-then-head-0.25", "mixture, then the head on clean images")
    assert (head["0"], head["0.25"], head["ACR"]) == ("+", "=", "+")
    frame = tables.open("cifar10-noise-pretraining:reduced").frame(RADII).set_index("name").ACR
    assert frame.nlargest(2).index.tolist() == ["mixture-then-noise-0.25", "clean-then-noise-0.25"]
