"""Records on disk."""

import contextlib
import json
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from properties.inputs import holds, names, wholes
from smoothkit.certify import certificates
from smoothkit.records import Identity, RecordError, Row, create_record, merge, open_record, pack
from smoothkit.types import StoppingRule


@holds(names, names, st.just(1), st.lists(st.integers(-1, 61), min_size=1, max_size=2), share=0.3)
def records_give_back_what_was_put_in(folder, key, classes, votes):
    """Unicode paths and keys, one class, counts that fit or do not."""
    rule = StoppingRule(n0=50, n=60, alpha=0.05)
    known = Identity("d", "test", "all", "m", "f", classes, 0.25, 0, "float", "float32", rule)
    with tempfile.TemporaryDirectory() as place:
        record = create_record(Path(place) / f"r{folder}", known)
        row = Row(0, key, 1, "d", 0, "estimate", 0, 60, tuple(votes))
        record.append([row], {"compute_batch": 1})
        record.journal().add(row, {"compute_batch": 1})
        rows = open_record(record.path).rows()
        assert rows["key"].tolist() == [key] and rows["counts"].tolist() == [tuple(votes)] and min(votes) >= 0
        with contextlib.suppress(RecordError):  # its selection is not there
            certificates(record)
        assert merge([record.path], Path(place) / "m").rows().equals(rows)
        assert pack(record.path, Path(place) / "p.zip").is_file()


@holds(st.binary(max_size=300), share=0.5)
def descriptions_of_any_bytes(content):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "run.json").write_bytes(content)
        open_record(place)


@holds(
    st.recursive(
        st.one_of(st.none(), st.booleans(), wholes, st.text(max_size=3)),
        lambda x: st.one_of(
            st.lists(x, max_size=3),
            st.dictionaries(
                st.sampled_from(["format", "identity", "class_names", "stopping_rule", "n"]), x, max_size=4
            ),
        ),
        max_leaves=8,
    ),
    share=0.5,
)
def descriptions_of_any_json(content):

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "run.json").write_text(json.dumps(content))
        open_record(place)
