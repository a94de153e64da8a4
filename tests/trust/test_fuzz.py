"""The short version of `make fuzz`, and that no pickle is ever loaded."""

import pickle

import fuzz_inputs
import pytest
from fuzz_logs import difference, fuzz_logs
from results import read

from smoothkit import data, logs, models
from smoothkit.records import RecordError, create_record, open_record


def test_mutated_logs_are_read_as_the_slow_reader_does():
    found = fuzz_logs(150, seed=5)
    assert found["wrong"] == [] and found["read"] > 40 and found["refused"] > 20


def test_the_fuzzer_would_notice(monkeypatch, tmp_path):
    """A reader that takes what float() takes is found out."""
    log = b"idx\tlabel\tpredict\tradius\n1_000\t1\t1\t0.5\n2\t1\t1\t0.5\n"
    assert difference(log, tmp_path / "log") == ("read", "")
    monkeypatch.setattr(
        logs, "_is_number", lambda text: bool(text) and text.replace("_", "").replace(".", "").isdigit()
    )
    assert "instead of" in difference(log, tmp_path / "log")[1]


@pytest.mark.parametrize("name", [name for name in fuzz_inputs.PROPERTIES if name != "command_lines"])
def test_properties_of_public_functions(name):
    fuzz_inputs.PROPERTIES[name](8)


def test_command_lines():
    fuzz_inputs.PROPERTIES["command_lines"](15)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_ever_loaded(tmp_path):
    sprung = tmp_path / "sprung"
    planted = pickle.dumps(Trap(sprung))
    for suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors"):
        (tmp_path / f"weights{suffix}").write_bytes(planted)
        for name in (f"local-dir:{tmp_path}/weights{suffix}", str(tmp_path / f"weights{suffix}")):
            with pytest.raises((ValueError, OSError)):
                models.load(name)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(planted)
        with pytest.raises((ValueError, OSError)):
            models.load(f"local-dir:{folder}")
        (folder / name).unlink()
    record = fuzz_record(tmp_path / "record")
    (record.path / "parts" / "part-000000-0.parquet").write_bytes(planted)
    with pytest.raises(RecordError, match="is damaged"):
        record.rows()
    (record.path / "run.json").write_bytes(planted)
    with pytest.raises(RecordError):
        open_record(record.path)
    (tmp_path / "x.parquet").write_bytes(planted)
    with pytest.raises((ValueError, OSError)):
        data.load(f"parquet:{tmp_path / 'x.parquet'}")
    (tmp_path / "log").write_bytes(planted)
    with pytest.raises(logs.LogError):
        logs.read_log(tmp_path / "log")
    assert not sprung.exists()
    pickle.loads(planted).close()  # the trap works
    assert sprung.exists()


def fuzz_record(path):
    from smoothkit.records import Identity
    from smoothkit.types import StoppingRule

    rule = StoppingRule(n0=10, n=20, alpha=0.05)
    return create_record(path, Identity("d", "test", "all", "m", "f", 2, 0.25, 0, "float", "float32", rule))


def test_the_kept_result():
    kept = read("fuzz")
    assert kept["silent_errors"] == 0 and kept["logs"]["tried"] >= 100_000 and not kept["logs_read_wrongly"]
    assert {p["property"] for p in kept["properties"]} == set(fuzz_inputs.PROPERTIES)
    assert all(p["tried"] and not p["problem"] for p in kept["properties"])
