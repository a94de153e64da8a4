"""Records of several machines joined into one, and a record as one file to share."""

import dataclasses
import itertools
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from smoothkit.records.format import Identity, RecordError, Row, write_atomically
from smoothkit.records.record import Record, create_record, open_record

HAS_PATH = ("folder", "parquet", "local-dir")  # names of data sets and models that end in a path
ALWAYS = (1980, 1, 1, 0, 0, 0)  # a zip's times say nothing of where and when it was made


def merge(paths: Sequence[str | os.PathLike], out: str | os.PathLike, *, subset: str | None = None) -> Record:
    """Join shards of one run, blocks by their key: equal duplicates collapse, unequal ones are an error.

    Parameters
    ----------
    paths : folders of records that differ in nothing but the subset of images
    out : a new or empty folder
    subset : str, optional
        What the images are together, a rule as in `data.Images.take`. Found by itself for ranges that follow each
        other, as range:0:500 and range:500:1000, and where all shards have one.

    Raises
    ------
    RecordError
        If identities differ, two shards disagree about a block, or `out` is taken.
    """
    if not paths:
        raise RecordError("merge needs at least one record")
    shards = [open_record(path) for path in paths]
    identity = shards[0].identity
    for shard in shards[1:]:
        differences = identity.differences(dataclasses.replace(shard.identity, subset=identity.subset))
        if differences:
            raise RecordError(f"{shard.path} is of another run than {shards[0].path}: it has {'; '.join(differences)}")
    subset = subset or _joined([shard.identity.subset for shard in shards])
    together = Record(None, dataclasses.replace(identity, subset=subset), shards[0].class_names)
    for shard in shards:
        together.append(_rows(shard), {})
    rows = _rows(together)  # refuses a block that two shards count otherwise
    merged = create_record(out, together.identity, together.class_names)
    if merged.parts() or merged.journals():
        raise RecordError(f"{out} already has parts; give an empty folder")
    ways = [way for shard in shards for p in shard.provenance() for way in p.get("parts", [p])]
    ways = [{k: v for k, v in way.items() if k != "time"} for way in ways]
    distinct = [way for i, way in enumerate(ways) if way not in ways[:i]]
    merged.append(rows, {"parts": distinct} if len(distinct) != 1 else distinct[0])
    return merged


def _rows(record: Record) -> list[Row]:
    return [Row(**row) for row in record.rows().sort_values(["index", "purpose", "start"]).to_dict("records")]


def _joined(subsets: Sequence[str]) -> str:
    """What several subsets are together."""
    distinct = sorted(set(subsets))
    if len(distinct) == 1:
        return distinct[0]
    found = [re.fullmatch(r"(.*,)?range:(\d+):(\d+)", subset) for subset in distinct]
    if all(found) and len({match[1] for match in found}) == 1:
        ranges = sorted((int(match[2]), int(match[3])) for match in found)
        if all(later[0] <= earlier[1] for earlier, later in itertools.pairwise(ranges)):
            return f"{found[0][1] or ''}range:{ranges[0][0]}:{max(stop for _, stop in ranges)}"
    raise RecordError(
        f"the shards are of {', '.join(distinct)}; say what they are together with subset=, as subset='all'"
    )


def pack(path: str | os.PathLike, out: str | os.PathLike) -> Path:
    """A record as one zip file, with its rows in one part; unpacked it is a record again.

    Paths in the names of data set and model are cut down to their last part. Ids of images stay as they are, so the
    votes can still be drawn again by whoever has the images.
    """
    record, out = open_record(path), Path(out)
    if out.exists():
        raise RecordError(f"{out} is there already; give another name")
    if not record.parts() and not record.journals():
        raise RecordError(f"{path} has no votes yet")
    with tempfile.TemporaryDirectory() as folder:
        packed = create_record(Path(folder) / "packed", _without_paths(record.identity), record.class_names)
        whole = compact(record, Path(folder) / "whole")
        packed.append(_rows(whole), whole.provenance()[0])
        files = [packed.path / "run.json", *packed.parts()]
        name = Path(out.stem).name

        def write(file) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for source in files:
                    inside = zipfile.ZipInfo(f"{name}/{source.relative_to(packed.path).as_posix()}", ALWAYS)
                    archive.writestr(inside, source.read_bytes())

        write_atomically(out, write)
    return out


def _without_paths(identity: Identity) -> Identity:
    return dataclasses.replace(identity, dataset=_last_part(identity.dataset), model=_last_part(identity.model))


def _last_part(name: str) -> str:
    kind, _, path = name.partition(":")
    last = re.split(r"[/\\]", path.rstrip("/"))[-1]
    return f"{kind}:{last}" if kind in HAS_PATH else name


def compact(record: Record, path: str | os.PathLike) -> Record:
    """A copy of a finished record as a single part, for keeping; provenance of the parts is gathered."""
    copy = create_record(path, record.identity, record.class_names)
    if copy.parts():
        raise RecordError(f"{path} already has parts; give an empty folder")
    rows = record.rows().sort_values(["index", "purpose", "start"])
    shared = [{k: v for k, v in p.items() if k != "time"} for p in record.provenance()]
    distinct = [p for i, p in enumerate(shared) if p not in shared[:i]]
    gathered = {"parts": distinct} if len(distinct) > 1 else distinct[0]
    gathered |= {"time": last} if (last := record.sampled()) else {}
    copy.append([Row(**row) for row in rows.to_dict("records")], gathered)
    return copy
