"""Rows of tables: settings with clear errors, training of the right parameters, records and cards that fit, intervals."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats
from torch import nn

from smoothbook import figures, tables
from smoothbook.tables import Row, RowError, Table, load_rows, make
from smoothbook.tables.build import check_row
from smoothkit import data, models
from smoothkit.reading import intervals

TINY = dict(sigma=0.25, epochs=1, batch=32, n0=10, n=100, images="every:120")


@pytest.fixture(scope="module")
def few():
    return data.load("digits", split="train", subset="first:64")


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


def written(folder, text):
    path = folder / "mine.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- settings ---


def test_defaults_and_lists_spread(tmp_path):
    path = written(
        tmp_path,
        "defaults: {sigma: [0.25, 0.5], epochs: 3}\n"
        "rows:\n- {name: plain}\n- {name: again, title: Again, seed: [1, 2], sigma: 1}\n",
    )
    found = load_rows(path)
    assert [r.name for r in found] == ["plain-0.25", "plain-0.50", "again-seed1", "again-seed2"]
    assert [r.title for r in found] == ["plain", "plain", "Again, seed 1", "Again, seed 2"]
    assert [r.sigma for r in found] == [0.25, 0.5, 1.0, 1.0] and {r.epochs for r in found} == {3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{name: a, sigma: 0.25, epoch: 3}", r"row a: unknown key 'epoch'; did you mean 'epochs'\?"),
        ("{name: a}", "row a: sigma is missing"),
        ("{sigma: 0.25}", "row 1: name must be str, got None"),
        ("{name: a, sigma: 0.25, lr: 1e-3}", r"lr must be float, got '1e-3'; YAML reads 1e-3 as text, write 0\.001"),
        ("{name: a, sigma: 0.25, epochs: 2.5}", "epochs must be int, got 2.5"),
        ("{name: a, sigma: 0.25, epochs: true}", "epochs must be int, got True"),
        ("{name: a, sigma: -1}", "sigma must be"),
        ("{name: A/b, sigma: 0.25}", "name must be lower-case"),
        ("{name: a, sigma: 0.25, method: loar}", r"method 'loar' is unknown; did you mean 'lora'\?"),
        ("{name: a, sigma: 0.25, loss: smoothad}", r"did you mean 'smoothadv'\?"),
        ("{name: a, sigma: 0.25, loss: macer, loss_settings: {lambda: 1}}", r"did you mean 'lambda_'\?"),
        ("{name: a, sigma: 0.25, loss: smoothadv, loss_settings: {steps: 2}}", r"loss_settings \(smoothadv\): epsilon is missing"),
        ("{name: a, sigma: 0.25, loss: smoothadv, loss_settings: {attack: fgsm, epsilon: 1}}", "attack 'fgsm' is unknown"),
        ("{name: a, sigma: 0.25, loss: consistency, loss_settings: {copies: 1}}", "copies must be at least 2"),
        ("{name: a, sigma: 0.25, schedule: 'gird:0,1'}", "unknown schedule 'gird:0,1'"),
        ("{name: a, sigma: 0.25, method: lora, adapter: {rang: 4}}", r"adapter \(lora\): unknown key 'rang'; did you mean 'rank'\?"),
        ("{name: a, sigma: 0.25, adapter: {rank: 4}}", "with method full, which has no adapter"),
        ("{name: a, sigma: [0.25, yes]}", r"sigma\[1\] must be float, got True"),
        ("{name: a, sigma: 0.25, method: coordinator, steps: 3, adapter: {widths: [4, 2.5]}}", r"widths\[1\] must be int, got 2.5"),
        ("{name: a, sigma: 0.25, method: coordinator}", "give steps"),
        ("{name: a, sigma: 0.25, spsa: {repeat: 4}}", r"did you mean 'repeats'\?"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_would_do(row, message, tmp_path):
    with pytest.raises(RowError, match=message):
        load_rows(written(tmp_path, f"rows:\n- {row}\n"), check=check_row)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{name: a, sigma: 1}, {name: a, sigma: 1}]", "two rows named a"),
        ("row: []", r"mine\.yaml: unknown key 'row'; did you mean 'rows'\?"),
        ("title: t", r"mine\.yaml: rows is missing"),
        ("rows: [3]", r"mine\.yaml: rows\[0\] must be dict, got 3"),
        ("rows: []\ndefault: {}", r"did you mean 'defaults'\?"),
        ("rows: [", "is no YAML"),
    ],
)
def test_wrong_files_say_so(text, message, tmp_path):
    with pytest.raises(RowError, match=message):
        load_rows(written(tmp_path, text))


def test_rows_that_are_certified_otherwise_share_their_training():
    one = Row("a", 0.25)
    assert one.training_digest() == dataclasses.replace(one, name="b", n=5_000).training_digest()
    assert one.training_digest() != dataclasses.replace(one, sigma=0.5).training_digest()  # its noise follows sigma
    control = dataclasses.replace(one, schedule="clean")
    assert control.training_digest() == dataclasses.replace(control, sigma=0.5).training_digest()
    assert one.training_digest() == dataclasses.replace(one, schedule="fixed:0.25").training_digest()
    assert one.made_like(dataclasses.replace(one, title="A")) and not one.made_like(dataclasses.replace(one, n=500))


# --- training ---

TRAINED = {
    "full": (dict(loss="consistency"), lambda name: True),
    "lora": (dict(adapter={"rank": 2}), lambda name: "lora_" in name or "modules_to_save" in name),
    "bottleneck": (dict(adapter={"width": 4}), lambda name: ".up." in name or ".down." in name or "head" in name),
    "prompts": (dict(adapter={"length": 2}, lr=0.01), lambda name: "prompts" in name or "head" in name),
    "certifying": (
        dict(adapter={"adapter_settings": {"width": 4, "depth": 1, "stages": 2}}),
        lambda name: name.startswith(("network.adapter.", "network.head.")),
    ),
}


@pytest.mark.parametrize("method", TRAINED)
def test_training_moves_what_the_method_trains_and_nothing_else(method, few, base):
    settings, wanted = TRAINED[method]
    row = Row("a", method=method, **{**TINY, **settings})
    before = {k: v.clone() for k, v in make.build(row, base).named_parameters()}
    fitted = make.train_row(row, few, base=base, progress=False)
    after = dict(fitted.model.named_parameters())
    moved = {k for k in after if not (after[k] == before[k]).all()}
    assert moved and all(wanted(name) for name in moved)
    assert {k for k, p in after.items() if p.requires_grad} == {k for k in after if wanted(k)}
    assert fitted.trained.trained == sum(p.numel() for k, p in after.items() if wanted(k))
    assert models.fingerprint(base) == models.fingerprint(models.load("starter:digits-vit-clean"))


def test_a_row_made_from_another_says_what_it_needs(few):
    with pytest.raises(RowError, match=r"r is made from the row pre; give base=table\['r'\].base\(\)"):
        make.train_row(Row(name="r", **{**TINY, "images": "all"}, base="row:pre"), few, progress=False)


def test_a_clean_row_is_the_base_itself(few, base):
    fitted = make.train_row(Row("a", method="clean", **TINY), few, base=base)
    assert (fitted.steps, fitted.trained.trained, fitted.interrupted) == (0, 0, False)
    assert models.fingerprint(fitted.model) == models.fingerprint(base)


@pytest.mark.parametrize("loss", ["gaussian", "stability", "macer", "smoothadv"])
def test_every_loss_trains_and_tells_each_epoch(loss, few, base):
    small = {"macer": {"copies": 2}, "smoothadv": {"epsilon": 0.25, "steps": 1, "copies": 1}}
    row = Row("a", loss=loss, loss_settings=small.get(loss, {}), **TINY)
    seen = []
    fitted = make.train_row(row, few, base=base, progress=False, on_epoch=lambda history: seen.append(len(history)))
    assert seen == [1] and np.isfinite(fitted.rows[0]["loss"])


def test_a_coordinator_counts_its_queries(few, base, tmp_path):
    settings = {**TINY, "method": "coordinator", "steps": 2, "spsa": {"repeats": 1}, "validation": 0.0}
    row = Row("a", adapter={"encoder": "starter:digits-vit-clean", "cube": 20}, **settings)
    fitted = make.train_row(row, few, base=base, progress=False)
    record = make.certify_row(
        row, fitted.model, data.load("digits", subset="first:1"), progress=False, out=tmp_path / "v"
    )
    assert make.make_card(row, fitted, record).queries == 2 * 2 * 32


def test_a_test_split_is_refused(base):
    with pytest.raises(ValueError, match="test split"):
        make.train_row(Row("a", **TINY), data.load("digits"), base=base, progress=False)


# --- a table from end to end ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two rows, made as by the script; their folder of data."""
    root = tmp_path_factory.mktemp("table") / "data"
    written(
        root / "rows",
        f"defaults: {json.dumps(TINY)}\nrows:\n- {{name: base, title: Base, method: clean}}\n"
        "- {name: noisy, title: Noisy, method: lora, adapter: {rank: 2}}\n",
    )
    assert make.make_table("mine", data=root) == ["base", "noisy"]
    return root


def test_records_and_cards_are_read_back(made):
    mine = tables.open("mine", data=made)
    frame = mine.frame(radii=(0.0, 0.25))
    assert list(frame.name) == ["base", "noisy"] and list(frame.title) == ["Base", "Noisy"]
    assert list(frame.images) == [3, 3] and (frame.problem == "").all()
    assert frame.trained[0] == 0 < frame.trained[1] < frame.parameters[1]
    assert frame.seconds[0] == 0 < frame.seconds[1] and list(frame.epochs) == [0, 1]
    curves = mine.certificates(sigma=0.25)
    assert frame["0.25"][1] == (curves["Noisy"].correct & (curves["Noisy"].radius >= 0.25)).mean()
    shown = mine.format(radii=(0.0, 0.25))
    assert shown["at 0"][0].count(",") == 1 and "queries" not in shown
    noisy = mine["noisy"]
    assert noisy.card.row == noisy.row == load_rows(made / "rows" / "mine.yaml")[1] and noisy.state == "kept"
    assert noisy.card.fingerprint == noisy.record.identity.fingerprint
    assert str(made) not in json.dumps(dataclasses.asdict(noisy.card))


def test_a_table_says_what_it_is_and_what_is_missing(made):
    rows = load_rows(made / "rows" / "mine.yaml")
    mine = Table("mine:<x>", [*rows, Row("later", 0.5)], made / "records" / "rows" / "mine")
    assert list(mine) == ["base", "noisy", "later"] and mine.made == ["base", "noisy"] and mine.missing() == ["later"]
    assert mine["later"].state == "missing" and "later" in mine and "never" not in mine
    said = mine._repr_html_()
    assert "2 of 3 rows are made (digits, 3 test images, n = 100" in said
    assert "python data/make_rows.py mine --variant &lt;x&gt;</code>): later" in said
    with pytest.raises(
        RowError, match=r"later is not made yet: python data/make_rows\.py mine --variant <x> --only later"
    ):
        mine["later"].certificates  # noqa: B018
    assert list(mine.certificates(["later", "noisy"])) == ["Noisy"]  # what is not made is left out
    with pytest.raises(RowError, match="has no row that is made, among later"):
        mine.frame(names=["later"])


def test_rows_of_other_images_are_compared_where_they_meet(made):
    """`shared` takes the images that all rows have, for curves, lines and differences alike."""
    mine = tables.open("mine", data=made)
    few = mine["noisy"].certificates.iloc[:2]

    class Shorter(Table):
        def __getitem__(self, name):
            row = super().__getitem__(name)
            if name == "noisy":
                row.__class__ = type("Few", (tables.TableRow,), {"certificates": few})
            return row

    other = Shorter("mine", mine.rows.values(), mine.folder)
    assert [len(t) for t in other.certificates(shared=True).values()] == [2, 2]
    assert list(other.frame(shared=True).images) == [2, 2] and list(other.frame().images) == [3, 2]
    with pytest.raises(ValueError, match="not of the same images"):
        other.compare("base", [0.25])
    found = other.compare("base", [0.25], shared=True)
    assert list(found.row) == ["Noisy", "Noisy"]
    base = mine["base"].certificates.iloc[:2]
    gained = (few.correct & (few.radius >= 0.25)).mean() - (base.correct & (base.radius >= 0.25)).mean()
    assert found.set_index("what").difference["0.25"] == pytest.approx(gained)


def test_what_is_kept_is_not_made_again_and_what_changed_is_said(made, capsys, tmp_path):
    assert make.make_table("mine", data=made) == []
    text = (made / "rows" / "mine.yaml").read_text()
    shutil.copytree(made / "records", tmp_path / "records")
    written(tmp_path / "rows", text.replace("rank: 2", "rank: 1").replace("Base", "The base"))
    assert make.make_table("mine", data=tmp_path) == []
    assert "kept from other settings, or unreadable: noisy; --again" in capsys.readouterr().err
    with pytest.raises(RowError, match="row 'nosy' is unknown; did you mean 'noisy'"):
        make.make_table("mine", only=["nosy"], data=made)


def test_a_lost_row_is_made_again_from_its_training(made, monkeypatch):
    """The votes are sampled anew, the same; the training is read from its checkpoint, not repeated."""
    noisy = tables.open("mine", data=made)["noisy"]
    before, seconds = noisy.certificates, noisy.card.seconds
    shutil.rmtree(noisy.folder)
    monkeypatch.setattr(nn.Module, "zero_grad", None)
    assert make.make_table("mine", data=made) == ["noisy"]
    assert noisy.card.seconds == seconds
    pd.testing.assert_frame_equal(noisy.certificates, before)


CHAIN = [
    dict(name="pre", base="random:starter:digits-vit-clean", num_classes=4, schedule="clean", keep=True),
    dict(name="lora", base="row:pre-{sigma}", method="lora", adapter=dict(rank=2), keep=True),
    dict(name="head", base="row:pre-{sigma}", method="head"),
    dict(name="small", base="row:pre-{sigma}", method="certifying", adapter=dict(adapter_settings=dict(width=4, depth=1, stages=1))),
    dict(name="large", base="row:pre-{sigma}", method="certifying", schedule="fixed:0.5",
         adapter=dict(adapter_settings=dict(width=4, depth=1, stages=1))),
    dict(name="both", method="ensemble", adapter=dict(members={0.25: "row:small-{sigma}", 0.5: "row:large-{sigma}"})),
]  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Rows made from other rows, on four of the digits, in a reduced variant."""
    root = tmp_path_factory.mktemp("chain") / "data"
    shared = dict(epochs=3, n0=10, n=20, images="classes:6-9,first:3", batch=64, train_images="classes:6-9,first:300")
    content = dict(defaults=shared, variants=dict(short=dict(epochs=1, sigma=[0.25])), rows=CHAIN)
    written(root / "rows", json.dumps(content))
    assert make.make_table("mine:short", data=root) == [f"{row['name']}-0.25" for row in CHAIN]
    assert make.make_table("mine:short", data=root) == []
    return root


@pytest.mark.slow
def test_rows_are_made_from_other_rows(chain):
    table = tables.open("mine:short", data=chain)
    frame = table.frame().set_index("name")
    assert (frame.problem == "").all() and frame.epochs["pre-0.25"] == 1
    assert frame.trained["head-0.25"] == 64 * 4 + 4 and frame.trained["both-0.25"] == 0
    assert frame.parameters["pre-0.25"] == frame.trained["pre-0.25"] == frame.parameters["head-0.25"]
    for name in ("pre-0.25", "lora-0.25"):  # as stored, in half precision, they are what was certified
        assert models.fingerprint(table[name].classifier()) == table[name].card.fingerprint
    assert table["head-0.25"].base().network.num_classes == 4
    with pytest.raises(RowError, match=r"small-0.25 was not stored; set keep: true"):
        table["small-0.25"].classifier()


def test_a_row_changes_with_the_row_it_is_made_from(chain, tmp_path):
    content = json.loads((chain / "rows" / "mine.yaml").read_text())
    content["rows"][0]["lr"] = 0.5
    changed = load_rows(written(tmp_path, json.dumps(content)), "short")
    table = tables.open("mine:short", data=chain)
    states = {name: row.state for name, row in Table("changed", changed, table.folder).items()}
    assert states["pre-0.25"] == states["lora-0.25"] == states["head-0.25"] == "changed"
    assert {row.state for row in table.values()} == {"kept"}


def test_a_row_of_another_table_is_copied(chain, capsys):
    """The same settings under another name: no second training, no second sampling."""
    again = json.loads((chain / "rows" / "mine.yaml").read_text())
    again["rows"] = [{**again["rows"][0], "name": "first", "title": "First", "note": "as before"}]
    (chain / "rows" / "other.yaml").write_text(json.dumps(again))
    assert make.make_table("other:short", data=chain) == ["first-0.25"]
    assert "first-0.25: is mine-short/pre-0.25, copied from there" in capsys.readouterr().err
    copied = tables.open("other:short", data=chain)["first-0.25"].card
    assert copied.row.title == "First" and copied.row.note == "as before"
    assert copied.fingerprint == tables.open("mine:short", data=chain)["pre-0.25"].card.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"base": "row:later"}, "made from later, which is no row before it"),
        ({"keep": "here"}, "keep must be true, false or, for a model trained whole, starter:NAME, got 'here'"),
        ({"keep": "starter:x", "method": "lora"}, "keep must be true, false or"),
    ],
)
def test_rows_made_from_nothing_say_so(row, message, tmp_path):
    with pytest.raises(RowError, match=message):
        load_rows(written(tmp_path, json.dumps({"rows": [{"name": "a", "sigma": 0.25, **row}]})))


def test_an_unknown_variant_says_which_there_are(tmp_path):
    text = json.dumps({"variants": {"reduced": {}}, "rows": [{"name": "a", "sigma": 0.25}]})
    with pytest.raises(RowError, match="variant 'reducd' is unknown; did you mean 'reduced'"):
        load_rows(written(tmp_path, text), "reducd")


def test_an_interrupted_training_stops_the_making_and_goes_on(made, monkeypatch, tmp_path):
    train_row = make.train_row

    def interrupted(*arguments, **settings):
        return dataclasses.replace(train_row(*arguments, **settings), interrupted=True)

    shutil.copytree(made / "rows", tmp_path / "data" / "rows")
    monkeypatch.setattr(make, "train_row", interrupted)
    with pytest.raises(RowError, match="noisy: interrupted; the same command goes on"):
        make.make_table("mine", only=["noisy"], data=tmp_path / "data")
    assert not (tmp_path / "data" / "records").exists()


def at_another_sigma(path):
    """As a record of another run would be that was put there, without a checksum as in earlier versions."""
    about = json.loads(path.read_text())
    del about["sha256"]
    about["identity"]["sigma"] = 0.5
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "card.json").unlink(), "noisy: no card.json; make the row again"),
        (lambda p: (p / "card.json").write_text("{"), "noisy: card.json cannot be read"),
        (lambda p: (p / "run.json").unlink(), "noisy is no vote record"),
        (lambda p: next((p / "parts").iterdir()).write_bytes(b"PAR1"), "noisy.*is damaged"),
        (
            lambda p: (p / "run.json").write_text((p / "run.json").read_text().replace('"sigma": 0.25', '"sigma": 0.5')),
            "does not fit its checksum",
        ),
        (lambda p: at_another_sigma(p / "run.json"), "sigma 0.5 in the record, 0.25 in the card"),
    ],
)  # fmt: skip
def test_a_broken_row_says_so_and_the_others_are_shown(harm, message, made, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    mine = tables.open("mine", data=tmp_path / "data")
    harm(mine["noisy"].folder)
    with pytest.warns(UserWarning, match=message):
        frame = mine.frame()
    assert frame.problem[0] == "" and frame.images[0] == 3 and np.isnan(frame.ACR[1])
    with pytest.warns(UserWarning):
        assert mine.format()["at 0"][1] == "unreadable"
    with pytest.raises(ValueError):
        mine.certificates()


def test_reading_nothing_is_an_error(tmp_path, made):
    mine = tables.open("mine", data=made)
    with pytest.raises(RowError, match=r"holds no rows; make them with python data/make_rows.py mine"):
        Table("mine", mine.rows.values(), tmp_path / "mine").frame()
    with pytest.raises(RowError, match=r"has no row at sigma 0\.5"):
        mine.certificates(sigma=0.5)
    with pytest.raises(RowError, match=r"did you mean 'noisy'\?"):
        mine.certificates(["nosy"])


@pytest.mark.slow
def test_reading_a_table_needs_no_classifier():
    """Neither opening one nor its certificates bring timm or peft, which take seconds."""
    code = "from smoothbook import tables; tables.open('peft').frame(); import sys; print({'timm', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- how sure ---


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 7), (310, 360), (360, 360)])
def test_wilson_is_scipys(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert intervals.wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def one_table(right, radius):
    n = len(right)
    return pd.DataFrame({"image_id": np.arange(n), "correct": right, "radius": radius, "predict": 0, "label": 0})


def test_paired_bootstrap_against_the_normal_interval():
    rng = np.random.default_rng(0)
    hard = rng.uniform(size=400)
    one, other = one_table(hard < 0.8, np.full(400, 0.3)), one_table(hard < 0.7, np.full(400, 0.3))
    found = intervals.paired_bootstrap(one, other.sample(frac=1, random_state=0), radii=(0.25, 0.5)).set_index("what")
    gained = ((hard >= 0.7) & (hard < 0.8)).mean()
    half = 1.96 * np.sqrt(gained * (1 - gained) / 400)  # images are paired, so only the gained ones vary
    assert found.difference["0.25"] == pytest.approx(gained)
    assert found.low["0.25"] == pytest.approx(gained - half, abs=0.005)
    assert found.high["0.25"] == pytest.approx(gained + half, abs=0.005)
    assert (found.loc["0.5"] == 0).all() and found.difference["ACR"] == pytest.approx(0.3 * gained)
    verdicts = (
        intervals.compare({"a": one, "b": other, "c": other}, "b", radii=(0.25,)).set_index(["row", "what"]).verdict
    )
    assert verdicts["a", "0.25"] == "above" and verdicts["c", "0.25"] == "not told apart"


def test_paired_bootstrap_refuses_other_images():
    one = one_table(np.ones(4, bool), np.ones(4))
    with pytest.raises(ValueError, match="not of the same images"):
        intervals.paired_bootstrap(one, one.assign(image_id=one.image_id + 1))


# --- figures of rows ---


def test_training_curves_show_what_the_history_has():
    history = [{"epoch": e, "loss": 1 / e, "accuracy": 0.5, "validation_accuracy": 0.4} for e in (1, 2, 3)]
    fig = figures.training_curves(history, "Title")
    assert [t.name for t in fig.data] == ["loss, training", "noisy, training", "noisy, validation"]
    assert list(fig.data[0].x) == [1, 2, 3] and fig.layout.yaxis2.range[0] == 0
    black_box = figures.training_curves([{"step": 5, "loss": 1.0, "accuracy": 0.2}])
    assert list(black_box.data[0].x) == [5]
    with pytest.raises(ValueError, match="must have epoch"):
        figures.training_curves([{"loss": 1.0}])


def test_difference_figure_has_a_panel_for_each_quantity():
    frame = pd.DataFrame(
        [("a", "0.25", 0.1, 0.05, 0.15), ("b", "0.25", 0.0, -0.1, 0.1), ("a", "ACR", 0.2, 0.1, 0.3), ("b", "ACR", 0, -1, 1)],
        columns=["row", "what", "difference", "low", "high"],
    )  # fmt: skip
    fig = figures.difference_figure(frame, "c")
    assert [t.name for t in fig.data] == ["a", "b", "a", "b"]
    assert [t.marker.symbol for t in fig.data[:2]] == ["circle", "circle-open"]  # leaves 0 on one side, or not
    assert fig.data[0].error_x.array[0] == pytest.approx(0.05)
    assert [a.text for a in fig.layout.annotations] == ["at r = 0.25", "ACR"]
    with pytest.raises(ValueError, match="lacks"):
        figures.difference_figure(frame.drop(columns="low"), "c")


def test_a_live_figure_is_one_output_that_changes(monkeypatch, tmp_path):
    import IPython
    from IPython import display

    calls = []

    class Handle:
        def update(self, bundle, raw):
            calls.append(bundle["text/plain"])

    def shown(bundle, raw, display_id):
        calls.append("first")
        return Handle()

    live = figures.Live()
    live.update(figures.training_curves([{"epoch": 1, "loss": 1.0}]))  # a plain script
    assert calls == []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(display, "display", shown)
    fig = figures.training_curves([{"epoch": 1, "loss": 1.0}], "Growing")
    live.update(fig)
    live.update(fig)
    figures.show(fig, "live", figures_dir=tmp_path, caption="The last", live=live)
    assert calls == ["first", "[figure: Growing]", "[figure: The last]"]
    assert json.loads((tmp_path / "live.json").read_text())["caption"] == "The last"


# --- what is committed ---


@pytest.mark.parametrize("name", tables.kept())
def test_committed_rows_are_those_of_their_settings(name):
    """A row may still be missing, and its notebook says so; one that is there is what the settings say."""
    table = tables.open(name)
    frame = table.frame()
    assert (frame.problem == "").all() and list(frame.name) == table.made
    assert {path.name for path in table.folder.iterdir()} <= set(table)
    for row in (table[name] for name in table.made):
        assert row.state == "kept", f"{row}: settings and card differ; run {table.command} --again"
        assert row.card.row.title == row.row.title and not row.card.interrupted
    said = table.protocol(frame.name[:1])
    assert f", {frame.images[0]} test images, n = {table.rows[frame.name[0]].n:,}, " in said
    assert said.endswith("reduced run") == name.endswith(":reduced")


def test_every_folder_of_records_belongs_to_a_table():
    known = {name.replace(":", "-") for name in tables.kept()}
    assert {path.name for path in (ROOT / "data" / "records" / "rows").iterdir()} == known
