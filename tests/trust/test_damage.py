"""Whatever is read again may have been damaged: the error is that of the reader, names the file, and says what to do.

Every kind of file that the packages write and read: bits flipped at the beginning, in the middle and at the end, files cut
short, bytes that are no text, and JSON of another shape than what was written.
"""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from properties.inputs import eight, vit
from properties.tables import CARD

from smoothbook import adapters, denoise
from smoothbook.bench.plan import known_rate
from smoothbook.figures.show import read_figure
from smoothbook.runner import gallery
from smoothbook.runner.notebooks import load_preset
from smoothbook.sigma.ledger import Ledger, LedgerError
from smoothbook.sigma.sound import GEOMETRY, keep_geometry, read_geometry
from smoothbook.tables import Card, RowError, load_rows, selectors
from smoothbook.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from smoothkit import data, models
from smoothkit.reading import ReportError
from smoothkit.records import Identity, RecordError, Row, create_record, open_record
from smoothkit.types import StoppingRule

Kind = tuple[Path, Callable[[], object], type[Exception]]
KINDS: dict[str, Callable[[Path], Kind]] = {}


def kind(make: Callable[[Path], Kind]) -> Callable[[Path], Kind]:
    """Makes a good file in a folder; returns it, what reads it, and the error of that reader."""
    KINDS[make.__name__] = make
    return make


# --- records -------------------------------------------------------------------------------------------

ROWS = [Row(i, f"{i}", i, "d", 0, "select", 0, 10, (9, 1)) for i in range(3)]


def whole_record(folder: Path):
    rule = StoppingRule(n0=10, n=20, alpha=0.05)
    known = Identity("d", "test", "all", "m", "f", 2, 0.25, 0, "float", "float32", rule)
    record = create_record(folder / "r", known, ("a", "b"))
    record.append(ROWS, {"compute_batch": 10})
    journal = record.journal()
    for row in ROWS:
        journal.add(row, {"compute_batch": 10})
    return record


def read_record(path: Path):
    record = open_record(path)
    return record.provenance(), record.sampled(), record.rows()


@kind
def description(folder):
    record = whole_record(folder)
    return record.path / "run.json", lambda: open_record(record.path), RecordError


@kind
def part(folder):
    record = whole_record(folder)
    return record.parts()[0], lambda: read_record(record.path), RecordError


@kind
def journal(folder):
    record = whole_record(folder)
    return record.journals()[0], lambda: read_record(record.path), RecordError


# --- models and adapters -------------------------------------------------------------------------------


@kind
def card_of_a_starter(folder):
    for path in (data.data_dir() / "starters" / "digits-vit-clean").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    check = sys.modules["smoothkit.models.load"]._check_sha256
    return folder / "card.json", lambda: check(folder), ValueError


@kind
def config_of_a_model(folder):
    kept = models.save_local(models.load("starter:digits-vit-clean"), folder / "m")
    return kept / "config.json", lambda: models.load(f"local-dir:{kept}"), ValueError


def saved_adapter(folder: Path) -> Path:
    return adapters.lora(vit(), rank=2).save(folder / "a")


@kind
def config_of_an_adapter(folder):
    kept = saved_adapter(folder)
    return kept / "adapter.json", lambda: adapters.load(kept, vit()), ValueError


@kind
def weights_of_an_adapter(folder):
    kept = adapters.bottleneck(vit(), width=2).save(folder / "a")
    return kept / "adapter.safetensors", lambda: adapters.load(kept, vit()), ValueError


@kind
def config_of_a_denoiser(folder):
    kept = denoise.DnCNN(channels=1, sigma=0.25, depth=3, width=2).save(folder / "d")
    return kept / "denoiser.json", lambda: denoise.load_denoiser(kept), ValueError


@kind
def weights_of_a_denoiser(folder):
    kept = denoise.DnCNN(channels=1, sigma=0.25, depth=3, width=2).save(folder / "d")
    return kept / "denoiser.safetensors", lambda: denoise.load_denoiser(kept), ValueError


@kind
def checkpoint(folder):
    write_checkpoint(folder, {"weights": {"w": torch.arange(5.0)}, "step": 3, "rows": [{"loss": 1.0}], "identity": {}})
    return folder / CHECKPOINT, lambda: read_checkpoint(folder), ValueError


# --- tables, sigmas, benchmarks ------------------------------------------------------------------------


@kind
def card_of_a_row(folder):
    (folder / "card.json").write_text(json.dumps(CARD))
    return folder / "card.json", lambda: Card.read(folder), RowError


@kind
def rows_of_a_table(folder):
    (folder / "t.yaml").write_text("rows:\n- {name: a, sigma: 0.25, title: ein Titel}\n")
    return folder / "t.yaml", lambda: load_rows(folder / "t.yaml"), RowError


@kind
def preset(folder):
    (folder / "presets").mkdir()
    (folder / "presets" / "mine.yaml").write_text("_description: kurz und gut\n")
    return folder / "presets" / "mine.yaml", lambda: load_preset("mine", folder), ValueError


@kind
def sigmas_of_a_search(folder, monkeypatch):
    found = types.SimpleNamespace(sigma=np.full(8, 0.25))
    monkeypatch.setattr(selectors, "search_sigma", lambda *_, **__: found)
    model, images, search = vit(), eight(), {"steps": 1, "draws": 1}
    sampling = types.SimpleNamespace(seed=0, device=None, progress=False)

    def read():
        return selectors._search(model, images, 0.25, search, sampling, folder)

    read()
    return folder / "sigma.json", read, RecordError


@kind
def prototypes(folder):
    keep_geometry(folder, np.zeros((2, 1, 2, 2), np.float32), np.array([0.1, 0.2]), [1, 2], np.array([0.1, 0.2]))
    return folder / GEOMETRY, lambda: read_geometry(folder), RecordError


def a_ledger(folder: Path) -> Callable[[], None]:
    def read():
        Ledger(folder / "l", {"of": "entries"}, size=4).close()

    with Ledger(folder / "l", {"of": "entries"}, size=4) as ledger:
        ledger.append([b"abcd", b"efgh"])
    return read


@kind
def description_of_a_ledger(folder):
    read = a_ledger(folder)
    return folder / "l" / "ledger.json", read, LedgerError


@kind
def head_of_a_ledger(folder):
    read = a_ledger(folder)
    return folder / "l" / "head.json", read, LedgerError


@kind
def benchmark(folder):
    path = data.data_dir() / "benchmarks" / "overhead.json"
    path = path if path.is_file() else path.with_name("overhead-quick.json")
    (folder / "overhead.json").write_bytes(path.read_bytes())
    return folder / "overhead.json", lambda: known_rate("resnet20", folder), ValueError


# --- the workbook --------------------------------------------------------------------------------------


@kind
def figure_of_a_notebook(folder):
    about = {"name": "a", "caption": "c", "order": 1, "notebook": None, "figure": {"data": []}}
    (folder / "a.json").write_text(json.dumps(about))
    return folder / "a.json", lambda: read_figure(folder / "a.json"), ValueError


@kind
def results_of_notebooks(folder):
    about = {"preset": "smoke", "notebooks": {"a": {"status": "ok", "seconds": 1.0, "error": ""}}}
    (folder / "run.json").write_text(json.dumps(about))
    return folder / "run.json", lambda: gallery._read_run(folder), ReportError


# --- damage --------------------------------------------------------------------------------------------


def flipped(content: bytes, byte: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def flips(content: bytes) -> list[bytes]:
    """All bits of the first bytes and the last, and of some in between: 7 makes no ASCII, but a lead of several bytes."""
    last = len(content) - 1
    places = {0, 1, last, last - 1, *np.linspace(2, last, 12).astype(int).tolist()}
    return [flipped(content, byte, bit) for byte in sorted(places) for bit in range(8)]


def hopeless(content: bytes, suffix: str) -> list[bytes]:
    """What is no file of the kind any more."""
    middle = len(content) // 2
    no_text = [
        flipped(content, 0, 7),
        flipped(content, middle, 7),
        content[:middle] + b"\xe2\x82" + content[middle:],  # two bytes of three
        b"\xff\xfe\x00" + content,
    ]
    too_short = [content[:middle], b"", b"\x00" * 64]
    if suffix in (".yaml", ".jsonl"):  # a part of YAML may be YAML; a journal ends where its run was killed
        return no_text
    return no_text + too_short if suffix == ".json" else too_short


def other_shapes(known: dict) -> list[object]:
    odd = [None, [], {}, "0.25", -1, 1e300, True, float("nan"), [None], {"": 0}]
    return [
        *({k: v for k, v in known.items() if k != name} for name in known),
        *({**known, name: value} for name in known for value in odd),
    ]


def named(path: Path, read: Callable, error: type[Exception], *, surely: bool) -> bool:
    """Whether reading raises; what it raises is the reader's own, in a line that names the file or its folder."""
    try:
        read()
    except Exception as found:
        assert type(found) is error, f"{type(found).__name__}: {found}"
        where = any(name in str(found) for name in (path.name, str(path.parent), f"preset {path.stem!r}"))
        assert where and "\n" not in str(found), str(found)
        return True
    assert not surely, f"{path.name} was read: {path.read_bytes()[:80]}"
    return False


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named(name, tmp_path, monkeypatch):
    extra = [monkeypatch] if "monkeypatch" in KINDS[name].__code__.co_varnames else []
    path, read, error = KINDS[name](tmp_path, *extra)
    whole = path.read_bytes()
    read()
    for damaged in hopeless(whole, path.suffix):
        path.write_bytes(damaged)
        named(path, read, error, surely=True)
    for damaged in flips(whole):
        path.write_bytes(damaged)
        named(path, read, error, surely=False)
    path.write_bytes(whole)
    read()


@pytest.mark.parametrize("name", KINDS)
def test_json_of_another_shape_is_named(name, tmp_path, monkeypatch):
    extra = [monkeypatch] if "monkeypatch" in KINDS[name].__code__.co_varnames else []
    path, read, error = KINDS[name](tmp_path, *extra)
    if path.suffix != ".json":
        pytest.skip("no JSON")
    known = json.loads(path.read_bytes())
    known.pop("sha256", None) if path.name == "run.json" else None  # a record of the first version has none
    for text in ("[]", "null", "3", '"{}"', "[" * 100_000, '{"a": NaN}', '{"a": 1' + "0" * 5_000 + "}", "{}{}"):
        path.write_text(text)
        named(path, read, error, surely=True)
    found = 0
    for changed in other_shapes(known):
        path.write_text(json.dumps(changed))
        found += named(path, read, error, surely=False)
    assert found, "any shape will do"


@pytest.mark.parametrize(
    "needle", [b"smoothkit", b"image_id", b'"fingerprint": "f"', b"sha256", b"compute_batch", b"PAR1"]
)
def test_names_and_metadata_of_a_part_that_are_no_text(needle, tmp_path):
    """Outside the pages, where no page checksum sees it: each byte in turn becomes one that no text has."""
    path, read, error = part(tmp_path)
    whole, known = path.read_bytes(), read()[2]
    found = [i for i in range(len(whole)) if whole.startswith(needle, i)]
    assert found
    for place in found:
        for byte in range(place, min(place + len(needle) + 70, len(whole))):  # the name, and what it stands for
            path.write_bytes(flipped(whole, byte, 7))
            if not named(path, read, error, surely=False):
                assert read()[2].equals(known)
