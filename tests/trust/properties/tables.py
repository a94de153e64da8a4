"""Tables of rows, cards and claims."""

import dataclasses
import json

from hypothesis import strategies as st

from properties.inputs import (
    as_yaml,
    copy_record,
    eight,
    folder,
    holds,
    kept_record,
    names,
    nested,
    numbers,
    refused,
    scalars,
    some_of,
    texts,
    vit,
)
from smoothbook import tables, training
from smoothbook.tables import build, make, settings
from smoothbook.tables.claims import read_claims
from smoothbook.tables.published import cohen_log, cohen_tables
from smoothkit import models
from smoothkit.certify import certificates

ROW = {"name": "a", "sigma": 0.25, "method": "lora", "epochs": 1, "adapter": {"rank": 2}}
ROW_KEYS = tuple(f.name for f in dataclasses.fields(settings.Row))
OF_ADAPTERS = ("rank", "members", "encoder", "objective", "attack", "epsilon", "kind", "sigmas", "dncnn", "a", "copies")
row_values = st.one_of(
    scalars,
    nested(*OF_ADAPTERS),
    st.sampled_from(
        ["lora", "clean", "full", "ensemble", "coordinator", "denoiser", "smoothadv", "macer", "row:a", "row:", "0.25"]
    ),
)
rows_of_tables = st.lists(some_of(ROW, ROW_KEYS, row_values), max_size=2)
whole_tables = st.one_of(
    nested("rows", "defaults", "variants", "name", "sigma"),
    st.fixed_dictionaries(
        {"rows": rows_of_tables}, optional={"defaults": row_values, "variants": row_values, "title": scalars}
    ),
)


@holds(
    st.one_of(
        whole_tables.map(as_yaml),
        texts,
        st.sampled_from(["rows: [{name: a", "&a [*a]", "rows: &a [*a]", "rows: [{? [1] : 2}]", "\0"]),
    ),
    st.one_of(st.none(), st.sampled_from(["reduced", "x"])),
)
def tables_of_any_yaml(content, variant):
    with folder() as place:
        (place / "t.yaml").write_text(content, encoding="utf-8")
        found = settings.load_rows(place / "t.yaml", variant, check=build.check_row)
        assert all(0 < row.sigma <= 20 for row in found) and len({row.name for row in found}) == len(found)
        assert all(row.training_digest({r.name: r for r in found}) for row in found)


@holds(
    st.one_of(texts, st.sampled_from(["sigma", "peft", "cifar10-peft:reduced", "peft:", ":", "../peft"])), share=0.15
)
def tables_by_name(name):
    table = tables.open(name)
    assert len(table) and name in tables.kept() and table.protocol() and table._repr_html_()
    assert {path.name for path in table.folder.iterdir()} <= set(table)


CARD = {
    "row": {"name": "a", "sigma": 0.25, "n0": 50, "n": 300}, "trained": 1, "parameters": 2, "steps": 1, "seconds": 1.0,
    "fingerprint": "",
}  # fmt: skip


@holds(
    st.one_of(nested("row", "trained", "seconds"), some_of(CARD, ("queries",), nested("name", "sigma", "n"))),
    st.one_of(st.just([0.25]), st.lists(numbers, max_size=2)),
    share=0.4,
)
def cards_of_any_json(content, radii):
    record = kept_record()
    if isinstance(content, dict) and content.get("fingerprint") == "":
        content["fingerprint"] = record["identity"]["fingerprint"]
    with folder() as place:
        copy_record(place / "a")
        (place / "a" / "card.json").write_text(json.dumps(content))
        table = tables.Table("t", [settings.Row("a", 0.25)], place)
        shown = table.frame(radii)
        assert len(shown) == 1 and len(table.format(radii)) == 1
        assert isinstance(table["a"].card.row, settings.Row)
        assert table.certificates() or shown["problem"][0]


@holds(
    st.one_of(st.just({}), st.dictionaries(st.sampled_from(ROW_KEYS), row_values, max_size=2)),
    st.sampled_from(["full", "head", "clean", "lora", "bottleneck", "prompts"]),
    share=0.15,
)
def rows_built_trained_and_certified(changed, method):
    """A row of any settings on the small base: its classifier, its training on eight images, its votes."""
    row = settings.Row(**{"name": "a", "sigma": 0.25, "epochs": 1, "batch": 4, "n": 20, "method": method} | changed)
    if (
        max(row.epochs, row.n0 / 100, row.n / 100, row.batch / 100) > 9
        or row.denoiser
        or row.search
        or row.base != settings.Row.base
    ):
        return
    with refused(training.TrainingDiverged):
        trained = make.train_row(row, eight(), base=vit(), progress=False).model
    assert type(build.build(row, vit(), image_shape=(1, 8, 8))) is type(trained)
    record = make.certify_row(row, trained, eight().take("first:2"), progress=False, batch=64)
    assert len(certificates(record)) == 2


@holds(
    st.sampled_from(["noise-training", "peft"]),
    st.one_of(texts, st.sampled_from(["full-0.25", "clean-0.25", "lora-16-0.25"])),
    share=0.05,
)
def classifiers_of_kept_rows(table, name):
    """The stored classifier, or why there is none; what a row was trained from is there whenever the row is."""
    row = tables.open(table)[name]
    assert isinstance(row.base(), models.BaseClassifier) and isinstance(row.classifier(), models.BaseClassifier)


CLAIM = {"claim": "c", "least": "gaussian-{sigma}", "tables": {"noise-training": [0.25]}, "radius": 0.25, "margin": 0.1}
CLAIMS = [{"system": "s", "source": "p", "claims": [CLAIM]}]
claim_values = st.one_of(
    scalars, nested("noise-training", "x"), st.sampled_from([["clean-0.25", "x"], {"peft": [0.25]}, "max: a b"])
)
claim_files = st.one_of(
    nested("system", "source", "claims", "tables"),
    st.builds(
        lambda claim, group: [{**CLAIMS[0], "claims": [claim], **group}],
        some_of(CLAIM, ("more", "alike"), claim_values),
        st.one_of(st.just({}), some_of({}, ("system", "source", "claims"))),
    ),
)


@holds(st.one_of(claim_files.map(as_yaml), texts), share=0.3)
def claims_of_any_yaml(content):
    """The reader of data/claims.yaml, at a file of any content."""
    with folder() as place:
        (place / "claims.yaml").write_text(content, encoding="utf-8")
        found = read_claims(place / "claims.yaml")
        assert all(c.holds in ("yes", "no", "unclear", "not measured") for c in found)


@holds(st.sampled_from(["sigma", "noise-training", "nonsense", ""]), share=0.02)
def claims_of_a_table(name):
    assert set(tables.claims(name)["holds"]) <= {"yes", "no", "unclear", "not measured"}


@holds(st.sampled_from(["cifar10", "imagenet", "x"]), numbers, numbers, names, share=0.3)
def where_cohen_kept_logs(dataset, trained, sigma, place):
    assert cohen_log(place, dataset, trained=trained, sigma=sigma).name.startswith("sigma_")
    cohen_tables(place)
    raise AssertionError("no logs were there")
