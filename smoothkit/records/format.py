"""The parts of a record on disk: identity, rows, checksums, journals, atomic files."""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoothkit.types import StoppingRule

FORMAT = 1
SELECT, ESTIMATE = "select", "estimate"
PER_IMAGE = "per-image"  # in place of a record's sigma where each image has its own
BLOCK_KEY = ["image_id", "purpose", "start", "stop"]
PROVENANCE, IDENTITY, CHECKSUM = "smoothkit", "smoothkit.identity", "smoothkit.sha256"  # of a part, in its metadata
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # position in the whole split
        ("key", pa.string()),
        ("image_id", pa.int64()),
        ("digest", pa.string()),
        ("label", pa.int64()),
        ("purpose", pa.string()),
        ("start", pa.int64()),  # first sample index of the block
        ("stop", pa.int64()),
        ("counts", pa.list_(pa.int64())),
    ]
)
_WITH_SIGMA = _SCHEMA.append(pa.field("sigma", pa.float64()))  # of a record with a sigma for each image


COPY, ANEW = "restore it from a copy", "move it away and run again: its votes are sampled anew, the same"


class RecordError(ValueError):
    """A record that cannot be used as it is; the message says what to do."""


def read_json(
    path: str | os.PathLike, error: type[ValueError] = RecordError, remedy: str = COPY, **needed: type | UnionType
) -> dict[str, Any]:
    """The JSON object that a file of ours holds; the one reader of them all.

    Parameters
    ----------
    path : path
    error : what is raised about damage
    remedy : what to do then, in words
    needed : types by the names that must be there; a Boolean is no number

    Raises
    ------
    error
        For bytes that are no UTF-8, text that is no JSON (NaN and Infinity are none), another value than an object, a name
        that is missing or of another type. It names the file.
    OSError
        As of any file that cannot be opened.
    """
    return parse_json(Path(path).read_bytes(), str(path), error, remedy, **needed)


def parse_json(
    content: bytes, where: str, error: type[ValueError] = RecordError, remedy: str = COPY, **needed: type | UnionType
) -> dict[str, Any]:
    """The same for bytes that were read from somewhere else."""
    try:
        found = json.loads(content.decode(), parse_constant=_refuse_constant)
        if not isinstance(found, dict):
            raise ValueError(f"no names and values, but {str(found)[:60]!r}")
        for name, kind in needed.items():
            if name not in found:
                raise ValueError(f"it lacks {name!r}")
            if not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
                raise ValueError(f"{name!r} is {str(found[name])[:60]!r}")
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} cannot be read ({problem}); {remedy}") from None
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree for votes to belong to one record.

    A base classifier is known by its `fingerprint` (structure and weights) and by its `probe`: what it answers on fixed
    rows, in which everything counts that a fingerprint does not see. Records of earlier versions have no probe; an empty
    one agrees with any.
    """

    dataset: str
    split: str
    subset: str
    model: str
    fingerprint: str
    num_classes: int
    sigma: float | str  # PER_IMAGE: each row says its own
    seed: int
    noise: str  # "grid:255" or "float"
    precision: str
    stopping_rule: StoppingRule
    probe: str = ""  # see `sampling.probe`
    scales: tuple[float, ...] = ()  # all sigmas of the cascade it was sampled for, asked or not

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Identity":
        """What was written as JSON.

        Raises
        ------
        TypeError, KeyError, ValueError
            For names that are missing or unknown, and values of another type.
        """
        scales = tuple(float(sigma) for sigma in fields.get("scales", ()))
        made = cls(**{**fields, "stopping_rule": StoppingRule(**fields["stopping_rule"]), "scales": scales})
        for field in dataclasses.fields(cls):
            value = getattr(made, field.name)
            kind = {"sigma": float | str | int, "scales": tuple}.get(field.name, field.type)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}")
        return made

    def differences(self, other: "Identity") -> list[str]:
        """Names and values that differ; a model is known by its fingerprint, whatever it is called."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        odd = [name for name in mine if name not in ("model", "probe") and mine[name] != theirs[name]]
        found = [f"{name} {theirs[name]!r} instead of {mine[name]!r}" for name in odd]
        if "fingerprint" not in odd and not same_probe(self.probe, other.probe):
            found.append(
                "a base classifier of the same structure and weights that answers otherwise (another setting?)"
            )
        return found


PROBE_APART = 1e-3  # of the largest number of a probe; machines differ in the last bits, classifiers in the first


def same_probe(mine: str, theirs: str) -> bool:
    """Whether two probes are answers of one classifier, as far as they say; an empty one agrees with any."""
    if not mine or not theirs:
        return True
    a, b = ([float(number) for number in probe.split()] for probe in (mine, theirs))
    largest = max(map(abs, [*a, *b]))
    return len(a) == len(b) and all(abs(x - y) <= PROBE_APART * largest or x == y for x, y in zip(a, b, strict=True))


@dataclasses.dataclass(frozen=True)
class Row:
    """Counts of all classes over samples start..stop-1 of one image, for one purpose."""

    index: int
    key: str
    image_id: int
    digest: str
    label: int
    purpose: str
    start: int
    stop: int
    counts: tuple[int, ...]
    sigma: float | None = None  # of this image, in a record with a sigma for each


def _read_part(path: Path, schema: pa.Schema) -> pa.Table:
    """A part's rows; a byte that changed anywhere may be no text, no number, no length: all of it is damage."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        columns = table.column_names
        stated = (table.schema.metadata or {}).get(CHECKSUM.encode())
        fits = stated in (None, _checksum(table).encode())
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); {ANEW}") from None
    if not table.schema.equals(schema):
        raise RecordError(f"{path} is no part of a vote record: its columns are {', '.join(columns)}; {ANEW}")
    if not fits:
        raise RecordError(f"{path} is damaged (its rows do not fit their checksum); {ANEW}")
    return _complete(table, path)


def _complete(table: pa.Table, path: Path) -> pa.Table:
    gaps = [name for name in table.column_names if table[name].null_count]
    if gaps:
        raise RecordError(f"{path} is damaged (rows lack {', '.join(gaps)}); {ANEW}")
    return table


def has_checksum(path: Path) -> bool:
    """Whether a part states the checksum of its contents; those of the first version have checksums of pages only."""
    return CHECKSUM.encode() in (pq.read_schema(path).metadata or {})


def _checksum(table: pa.Table) -> str:
    """sha256 over a part's rows, provenance and identity, whatever the file looks like."""
    digest = hashlib.sha256()
    for name in (PROVENANCE, IDENTITY):
        digest.update((table.schema.metadata or {}).get(name.encode(), b"") + b"\0")
    for name in table.column_names:
        values = table[name].combine_chunks()
        digest.update(f"{name} {len(values)} {values.null_count}".encode())
        if pa.types.is_list(values.type):
            digest.update(pc.list_value_length(values).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            values = values.flatten()
        if pa.types.is_string(values.type):
            digest.update("\0".join(str(v) for v in values.to_pylist()).encode())
        else:
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _digest_of_description(about: dict[str, Any]) -> str:
    known = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class Journal:
    """Finished rows, a line each with its checksum, handed to the operating system at once; gone when they are in a part."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._file = path, None

    def add(self, row: Row, provenance: dict[str, Any]) -> None:
        if self.path is None:
            return
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = json.dumps({"row": vars(row), "provenance": provenance}).encode()
        whole = b"%s %s\n" % (_digest_of_line(line), line)
        if os.write(self._file, whole) != len(whole):
            raise OSError(f"{self.path} could not be written whole; is the disk full?")

    def clear(self) -> None:
        """All its rows are in a part."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)


def _digest_of_line(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Its lines, as {"row": ..., "provenance": ...}; one that was being written when the run was killed is left out.

    Raises
    ------
    RecordError
        If a line before the last is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:  # its rows have become a part meanwhile
        return []
    found = []
    for number, line in enumerate(lines):
        digest, _, text = line.partition(b" ")
        if digest != _digest_of_line(text):
            if number < len(lines) - 1:
                raise RecordError(f"{path} is damaged at line {number + 1}; {ANEW}")
            break
        found.append(parse_json(text, f"{path}, line {number + 1}", remedy=ANEW, row=dict, provenance=dict))
    return found


def write_atomically(final: Path, write: Callable[[BinaryIO], None]) -> None:
    """A file that appears whole or not at all, and stays after a power cut; `write` gets it open for bytes."""
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # make the new name survive a power cut; Windows cannot open folders
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
