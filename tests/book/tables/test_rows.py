"""Rows of tables: settings with clear errors, training of the right parameters, records and cards that fit, intervals."""

import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats
from torch import nn

from smoothbook import figures
from smoothbook.settings import RowError
from smoothbook.tables import make
from smoothbook.tables import table as rows
from smoothbook.tables.settings import Row, load_rows
from smoothkit import data, models
from smoothkit.certify import certificates
from smoothkit.reading import intervals
from smoothkit.records import open_record

TINY = dict(sigma=0.25, epochs=1, batch=32, n0=10, n=100, images="every:120")


@pytest.fixture(scope="module")
def few():
    return data.load("digits", split="train", subset="first:64")


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def make_rows():
    spec = importlib.util.spec_from_file_location("make_rows", ROOT / "data" / "make_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
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
        ("{sigma: 0.25}", "row 1 must map settings"),
        ("{name: a, sigma: 0.25, lr: 1e-3}", r"lr must be float, got '1e-3'; YAML reads 1e-3 as text, write 0\.001"),
        ("{name: a, sigma: 0.25, epochs: 2.5}", "epochs must be int, got 2.5"),
        ("{name: a, sigma: 0.25, epochs: true}", "epochs must be int, got True"),
        ("{name: a, sigma: -1}", "sigma must be"),
        ("{name: A/b, sigma: 0.25}", "name must be lower-case"),
        ("{name: a, sigma: 0.25, method: loar}", r"method 'loar' is unknown; did you mean 'lora'\?"),
        ("{name: a, sigma: 0.25, loss: smoothad}", r"did you mean 'smoothadv'\?"),
        ("{name: a, sigma: 0.25, loss: macer, loss_settings: {lambda: 1}}", r"did you mean 'lambda_'\?"),
        ("{name: a, sigma: 0.25, loss: smoothadv, loss_settings: {steps: 2}}", "an attack needs epsilon"),
        ("{name: a, sigma: 0.25, loss: smoothadv, loss_settings: {attack: fgsm, epsilon: 1}}", "attack 'fgsm' is unknown"),
        ("{name: a, sigma: 0.25, loss: consistency, loss_settings: {copies: 1}}", "copies must be at least 2"),
        ("{name: a, sigma: 0.25, schedule: 'gird:0,1'}", "unknown schedule 'gird:0,1'"),
        ("{name: a, sigma: 0.25, method: lora, adapter: {rang: 4}}", r"adapter \(lora\): unknown key 'rang'; did you mean 'rank'\?"),
        ("{name: a, sigma: 0.25, adapter: {rank: 4}}", "with method full, which has no adapter"),
        ("{name: a, sigma: 0.25, method: coordinator}", "give steps"),
        ("{name: a, sigma: 0.25, spsa: {repeat: 4}}", r"did you mean 'repeats'\?"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_would_do(row, message, tmp_path):
    with pytest.raises(RowError, match=message):
        load_rows(written(tmp_path, f"rows:\n- {row}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [{name: a, sigma: 1}, {name: a, sigma: 1}]", "two rows named a"),
        ("row: []", "must map `rows`"),
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
    with pytest.raises(RowError, match=r"r is made from the row pre; give base=load_base\(rows, folder, row\)"):
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
    assert make.make_card(row, fitted, record)["queries"] == 2 * 2 * 32


def test_a_test_split_is_refused(base):
    with pytest.raises(ValueError, match="test split"):
        make.train_row(Row("a", **TINY), data.load("digits"), base=base, progress=False)


# --- a table from end to end ---


@pytest.fixture(scope="module")
def made(make_rows, tmp_path_factory):
    """Two rows, made by the script."""
    root = tmp_path_factory.mktemp("table")
    (root / "mine.yaml").write_text(
        f"defaults: {json.dumps(TINY)}\nrows:\n- {{name: base, title: Base, method: clean}}\n"
        "- {name: noisy, title: Noisy, train: full}\n".replace("train: full", "method: lora, adapter: {rank: 2}")
    )
    where = dict(settings=root, kept=root / "kept", work=root / "work")
    assert make_rows.make_table("mine", **where) == ["base", "noisy"]
    return root, where


def test_records_and_cards_are_read_back(made):
    root, _ = made
    table = rows.read_rows(root / "kept" / "mine", radii=(0.0, 0.25))
    assert list(table.name) == ["base", "noisy"] and list(table.title) == ["Base", "Noisy"]
    assert list(table.images) == [3, 3] and (table.problem == "").all()
    assert table.trained[0] == 0 < table.trained[1] < table.parameters[1]
    assert table.seconds[0] == 0 < table.seconds[1] and list(table.epochs) == [0, 1]
    tables = rows.read_certificates(root / "kept" / "mine", sigma=0.25)
    assert table["0.25"][1] == (tables["Noisy"].correct & (tables["Noisy"].radius >= 0.25)).mean()
    shown = rows.format_rows(table, radii=(0.0, 0.25))
    assert shown["at 0"][0].count(",") == 1 and "queries" not in shown
    row, card = rows.read_card(root / "kept" / "mine" / "noisy")
    assert row == load_rows(root / "mine.yaml")[1]
    assert card["fingerprint"] == open_record(root / "kept" / "mine" / "noisy").identity.fingerprint
    assert str(root) not in json.dumps(card)


def test_what_is_kept_is_not_made_again_and_what_changed_is_said(made, make_rows, capsys, tmp_path):
    root, where = made
    assert make_rows.make_table("mine", **where) == []
    text = (root / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("rank: 2", "rank: 1").replace("Base", "The base"))
    assert make_rows.make_table("mine", **{**where, "settings": tmp_path}) == []
    assert "kept from other settings, or unreadable: noisy; --again" in capsys.readouterr().err
    with pytest.raises(RowError, match="has no row nosy; there are base, noisy"):
        make_rows.make_table("mine", only=["nosy"], **where)


def test_a_lost_row_is_made_again_from_its_training(made, make_rows, monkeypatch):
    """The votes are sampled anew, the same; the training is read from its checkpoint, not repeated."""
    root, where = made
    folder = root / "kept" / "mine" / "noisy"
    before, seconds = certificates(open_record(folder)), rows.read_card(folder)[1]["seconds"]
    shutil.rmtree(folder)
    monkeypatch.setattr(nn.Module, "zero_grad", None)
    assert make_rows.make_table("mine", **where) == ["noisy"]
    assert rows.read_card(folder)[1]["seconds"] == seconds
    pd.testing.assert_frame_equal(certificates(open_record(folder)), before)


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
def chain(make_rows, tmp_path_factory):
    """Rows made from other rows, on four of the digits, in a reduced variant."""
    root = tmp_path_factory.mktemp("chain")
    shared = dict(epochs=3, n0=10, n=20, images="classes:6-9,first:3", batch=64, train_images="classes:6-9,first:300")
    content = dict(defaults=shared, variants=dict(short=dict(epochs=1, sigma=[0.25])), rows=CHAIN)
    (root / "chain.yaml").write_text(json.dumps(content))
    where = dict(settings=root, kept=root / "kept", work=root / "work", variant="short")
    names = [f"{row['name']}-0.25" for row in CHAIN]
    assert make_rows.make_table("chain", **where) == names
    assert make_rows.make_table("chain", **where) == []
    return {row.name: row for row in load_rows(root / "chain.yaml", "short")}, root / "kept" / "chain-short", where


def test_rows_are_made_from_other_rows(chain):
    wanted, folder, _ = chain
    table = rows.read_rows(folder).set_index("name")
    assert (table.problem == "").all() and table.epochs["pre-0.25"] == 1
    assert table.trained["head-0.25"] == 64 * 4 + 4 and table.trained["both-0.25"] == 0
    assert table.parameters["pre-0.25"] == table.trained["pre-0.25"] == table.parameters["head-0.25"]
    for name in ("pre-0.25", "lora-0.25"):  # as stored, in half precision, they are what was certified
        model = make.load_classifier(wanted, folder, name)
        assert models.fingerprint(model) == rows.read_card(folder / name)[1]["fingerprint"]
    assert make.load_base(wanted, folder, wanted["head-0.25"]).network.num_classes == 4
    with pytest.raises(RowError, match=r"small-0.25 was not stored; set keep: true"):
        make.load_classifier(wanted, folder, "small-0.25")


def test_a_row_changes_with_the_row_it_is_made_from(chain, make_rows, tmp_path):
    wanted, folder, where = chain
    content = json.loads((where["settings"] / "chain.yaml").read_text())
    content["rows"][0]["lr"] = 0.5
    (tmp_path / "chain.yaml").write_text(json.dumps(content))
    changed = {row.name: row for row in load_rows(tmp_path / "chain.yaml", "short")}
    states = {name: make_rows.state(row, folder, changed) for name, row in changed.items()}
    assert states["pre-0.25"] == states["lora-0.25"] == states["head-0.25"] == "changed"
    assert {make_rows.state(row, folder, wanted) for row in wanted.values()} == {"kept"}


def test_a_row_of_another_table_is_copied(chain, make_rows, capsys):
    """The same settings under another name: no second training, no second sampling."""
    _, folder, where = chain
    again = json.loads((where["settings"] / "chain.yaml").read_text())
    again["rows"] = [{**again["rows"][0], "name": "first", "title": "First", "note": "as before"}]
    (where["settings"] / "other.yaml").write_text(json.dumps(again))
    assert make_rows.make_table("other", **where) == ["first-0.25"]
    assert "first-0.25: is chain-short/pre-0.25, copied from there" in capsys.readouterr().err
    copied, card = rows.read_card(folder.parent / "other-short" / "first-0.25")
    assert copied.title == "First" and copied.note == "as before"
    assert card["fingerprint"] == rows.read_card(folder / "pre-0.25")[1]["fingerprint"]


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


def test_an_interrupted_training_stops_the_script_and_goes_on(made, make_rows, monkeypatch, tmp_path):
    where = {**made[1], "kept": tmp_path / "kept", "work": tmp_path / "work"}

    def interrupted(*arguments, **settings):
        return dataclasses.replace(make.train_row(*arguments, **settings), interrupted=True)

    monkeypatch.setattr(make_rows, "train_row", interrupted)
    with pytest.raises(SystemExit, match="noisy: interrupted; the same command goes on"):
        make_rows.make_table("mine", only=["noisy"], **where)
    assert not (tmp_path / "kept").exists()


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
    root, _ = made
    folder = tmp_path / "mine"
    shutil.copytree(root / "kept" / "mine", folder)
    harm(folder / "noisy")
    with pytest.warns(UserWarning, match=message):
        table = rows.read_rows(folder)
    assert table.problem[0] == "" and table.images[0] == 3 and np.isnan(table.ACR[1])
    assert rows.format_rows(table)["at 0"][1] == "unreadable"
    with pytest.raises(ValueError):
        rows.read_certificates(folder)


def test_reading_nothing_is_an_error(tmp_path, made):
    with pytest.raises(RowError, match=r"holds no rows; make them with python data/make_rows.py mine"):
        rows.read_rows(tmp_path / "mine")
    with pytest.raises(RowError, match=r"has no row at sigma 0\.5"):
        rows.read_certificates(made[0] / "kept" / "mine", sigma=0.5)
    with pytest.raises(RowError, match=r"did you mean 'noisy'\?"):
        rows.read_certificates(made[0] / "kept" / "mine", names=["nosy"])


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


@pytest.mark.parametrize("name", rows.kept_tables())
def test_committed_rows_are_those_of_their_settings(name):
    """A row may still be missing, and its notebook says so; one that is there is what the settings say."""
    wanted, folder = rows.open_table(name)
    table = rows.read_rows(folder)
    assert (table.problem == "").all() and len(table) > 0 and set(table.name) <= set(wanted)
    for row in table.name:
        kept, card = rows.read_card(folder / row)
        assert kept.made_like(wanted[row]), (
            f"{row}: settings and card differ; run data/make_rows.py {folder.name} --again"
        )
        assert kept.title == wanted[row].title and not card["interrupted"]
        digests = {other: wanted[other].training_digest(wanted) for other in wanted[row].made_from}
        assert card.get("made_from", {}) == digests
    said = rows.protocol(name, table.name[:1])
    assert f", {table.images[0]} test images, n = {wanted[table.name[0]].n:,}, " in said
    assert said.endswith("reduced run") == name.endswith(":reduced")


def test_every_folder_of_records_belongs_to_a_table():
    known = {name.replace(":", "-") for name in rows.kept_tables()}
    assert {path.name for path in (ROOT / "data" / "records" / "rows").iterdir()} == known
