"""Append-only vote records on disk: the one expensive thing, kept for ever.

A record is a folder:

    run.json                    format, identity, class names; written once
    parts/part-000000-a1b2c3d4.parquet    rows (image, purpose, block) -> counts; provenance in the metadata

    parts/journal-000000-e5f6a7b8.jsonl     rows that are in no part yet: of a run that goes on, or was killed

Parts appear by atomic rename and are never rewritten; until then finished blocks stand in a journal, so a killed run
loses the block it was sampling. Parts, journal lines and run.json carry checksums.
*Identity* (data, model, sigma, seed, noise, precision, stopping rule) must agree for a run to
go on; *provenance* (device, versions, compute batch) is kept per part. Radii are not stored: they are
computed from the counts on reading. This module knows votes and nothing else.
"""

import dataclasses
import html
import itertools
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from smoothkit.records.format import (
    _SCHEMA,
    _WITH_SIGMA,
    ANEW,
    BLOCK_KEY,
    CHECKSUM,
    COPY,
    ESTIMATE,
    FORMAT,
    IDENTITY,
    PER_IMAGE,
    PROVENANCE,
    SELECT,
    Identity,
    Journal,
    RecordError,
    Row,
    _checksum,
    _complete,
    _digest_of_description,
    _read_part,
    parse_json,
    read_journal,
    read_json,
    write_atomically,
)
from smoothkit.types import StoppingRule, block_edges


class Record:
    """A vote record; with `path=None` it lives in memory only."""

    def __init__(self, path: Path | None, identity: Identity, class_names: tuple[str, ...] = ()) -> None:
        self.path, self.identity, self.class_names = path, identity, tuple(class_names)
        self._memory: list[Row] = []
        self._memory_made: list[dict[str, Any]] = []

    @property
    def sigma(self) -> float | str:
        return self.identity.sigma

    @property
    def stopping_rule(self) -> StoppingRule:
        return self.identity.stopping_rule

    @property
    def num_classes(self) -> int:
        return self.identity.num_classes

    @property
    def per_image(self) -> bool:
        """Whether each image has a sigma of its own."""
        return self.sigma == PER_IMAGE

    @property
    def _schema(self) -> pa.Schema:
        return _WITH_SIGMA if self.per_image else _SCHEMA

    def __repr__(self) -> str:
        where = self.path if self.path else "in memory"
        return f"Record({where}: {self.identity.model} on {self.identity.dataset}, sigma={self.sigma}, n={self.stopping_rule.n:,})"

    def _repr_html_(self) -> str:
        known, rule = self.identity, self.stopping_rule
        about = {
            "record": self._name(),
            "base classifier": known.model,
            "images": f"{known.dataset}, {self.rows()['image_id'].nunique():,} with votes so far",
            "noise": f"sigma = {self.sigma}, {known.noise}, seed {known.seed}",
            "samples": f"n0 = {rule.n0:,}, n = {rule.n:,}, rule {rule.kind}",
        }
        rows = "".join(
            f'<tr><td style="text-align:left">{what}</td><td style="text-align:left">{html.escape(text)}</td></tr>'
            for what, text in about.items()
        )
        return f"<table>{rows}</table>"

    # --- writing ---

    def append(self, rows: Iterable[Row], provenance: dict[str, Any]) -> None:
        """Add one part; it is there whole or not at all."""
        rows = list(rows)
        if not rows:
            return
        if any((row.sigma is not None) != self.per_image for row in rows):
            raise RecordError(f"{self._name()}: rows must say a sigma if, and only if, the record's is {PER_IMAGE!r}")
        if self.path is None:
            self._memory.extend(rows)
            self._memory_made += [provenance] if provenance else []
            return
        table = pa.Table.from_pylist([vars(row) for row in rows], schema=self._schema)
        about = {PROVENANCE: json.dumps(provenance), IDENTITY: json.dumps(dataclasses.asdict(self.identity))}
        table = table.replace_schema_metadata(about)
        table = table.replace_schema_metadata({**about, CHECKSUM: _checksum(table)})
        final = self._new_file("part", "parquet")
        write_atomically(final, lambda file: pq.write_table(table, file, write_page_checksum=True, compression="zstd"))

    def journal(self) -> "Journal":
        """Where a run keeps finished rows until they are written as a part."""
        return Journal(None if self.path is None else self._new_file("journal", "jsonl"))

    def _new_file(self, kind: str, ending: str) -> Path:
        """A name after those that are there, and another for each process that asks."""
        parts = self.path / "parts"
        numbers = (re.match(rf"{kind}-(\d+)-", p.name) for p in parts.glob(f"{kind}-*"))
        number = 1 + max((int(found[1]) for found in numbers if found), default=-1)
        return parts / f"{kind}-{number:06d}-{secrets.token_hex(4)}.{ending}"

    # --- reading ---

    def parts(self) -> list[Path]:
        return [] if self.path is None else sorted((self.path / "parts").glob("part-*.parquet"))

    def provenance(self) -> list[dict[str, Any]]:
        """Device, versions and compute batch of each part."""
        of_parts = [
            parse_json((self.read_part(p).schema.metadata or {}).get(PROVENANCE.encode(), b""), str(p), remedy=ANEW)
            for p in self.parts()
        ]
        of_journals = [line["provenance"] for p in self.journals() for line in read_journal(p)[-1:]]
        return of_parts + of_journals + self._memory_made

    def journals(self) -> list[Path]:
        return [] if self.path is None else sorted((self.path / "parts").glob("journal-*.jsonl"))

    def read_part(self, path: Path) -> pa.Table:
        """A part's rows; refuses one that is damaged or belongs to another record."""
        table = _read_part(path, self._schema)
        known = (table.schema.metadata or {}).get(IDENTITY.encode())
        if known is None:  # written by the first version
            return table
        differences = self.identity.differences(_identity(parse_json(known, str(path), remedy=ANEW), str(path), ANEW))
        if differences:
            raise RecordError(
                f"{path} belongs to another record, or run.json is not the one it was written under: it has "
                f"{'; '.join(differences)}; move the part away, or restore run.json from a copy"
            )
        return table

    def _read_journal(self, path: Path) -> pa.Table:
        lines = [line["row"] for line in read_journal(path)]
        try:
            return _complete(pa.Table.from_pylist(lines, schema=self._schema), path)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise RecordError(f"{path} is damaged ({str(error).splitlines()[0]}); {ANEW}") from None

    def sampled(self) -> str:
        """When the last part was written, UTC; empty where no part says (older parts)."""
        return max((p["time"] for p in self.provenance() if "time" in p), default="")

    def rows(self) -> pd.DataFrame:
        """All rows, equal duplicates collapsed.

        Raises
        ------
        RecordError
            If a part is damaged, or two rows of one block disagree.
        """
        if self.path is None:
            frame = pd.DataFrame([dataclasses.asdict(row) for row in self._memory], columns=self._schema.names)
        else:
            tables = [self._read_journal(p) for p in self.journals()]  # first: they become parts
            tables += [self.read_part(p) for p in self.parts()]
            tables = [self._schema.empty_table(), *(t.replace_schema_metadata() for t in tables)]
            frame = pa.concat_tables(tables).to_pandas()
        frame["counts"] = [tuple(int(c) for c in counts) for counts in frame["counts"]]
        wrong = frame[
            [
                len(c) != self.num_classes or sum(c) > b - a
                for c, a, b in zip(frame["counts"], frame["start"], frame["stop"], strict=True)
            ]
        ]
        if len(wrong):
            raise RecordError(
                f"{self._name()}: image {wrong['key'].iloc[0]} has counts that do not fit {self.num_classes} classes and its block"
            )
        frame = frame.drop_duplicates([*BLOCK_KEY, "counts", "digest"]).reset_index(drop=True)
        clash = frame[frame.duplicated(BLOCK_KEY, keep=False)]
        if len(clash):
            raise RecordError(
                f"{self._name()}: image {clash['key'].iloc[0]} has two different counts for one block; "
                f"the parts come from different runs or machines: keep only one of them"
            )
        if self.per_image:
            self._check_one_sigma_an_image(frame)
        return frame

    def _check_one_sigma_an_image(self, frame: pd.DataFrame) -> None:
        known = frame[["image_id", "key", "sigma"]].drop_duplicates()
        twice = known[known.duplicated("image_id")]
        if len(twice):
            raise RecordError(
                f"{self._name()}: image {twice['key'].iloc[0]} was sampled at two sigmas; keep one run's parts"
            )
        sigmas = known["sigma"].to_numpy(np.float64)
        odd = known[~(np.isfinite(sigmas) & (sigmas > 0))]
        if len(odd):
            raise RecordError(
                f"{self._name()}: image {odd['key'].iloc[0]} has sigma {odd['sigma'].iloc[0]}; restore a copy"
            )

    def votes(self, n: int | None = None) -> pd.DataFrame:
        """One row an image whose selection and estimation samples are complete.

        Parameters
        ----------
        n : int, optional
            Use only the first n estimation samples; must be a block edge (see `edges`).

        Returns
        -------
        DataFrame with index, key, image_id, label, sigma, counts_selection, counts_estimation (int64 arrays), n0, n;
        sorted by index.
        """
        rule = self.stopping_rule
        if rule.kind != "fixed":
            raise RecordError(
                f"{self._name()} stopped by the rule {rule.kind!r}; its counts are no fixed-n sample, see `looks`"
            )
        n = rule.n if n is None else n
        if n not in self.edges():
            raise RecordError(f"{self._name()}: n={n} is not a block edge; choose one of {self.edges()}")
        frame = self.rows()
        ids, first, image = np.unique(frame["image_id"], return_index=True, return_inverse=True)
        about = frame.iloc[first][["index", "key", "image_id", "label"]].reset_index(drop=True)
        about["sigma"] = frame["sigma"].to_numpy(np.float64)[first] if self.per_image else float(self.sigma)
        complete = np.ones(len(ids), dtype=bool)
        for purpose, column, need in ((SELECT, "counts_selection", rule.n0), (ESTIMATE, "counts_estimation", n)):
            mine = ((frame["purpose"] == purpose) & (frame["stop"] <= need)).to_numpy()
            totals = np.zeros((len(ids), self.num_classes), dtype=np.int64)
            np.add.at(
                totals,
                image[mine],
                np.array(frame["counts"][mine].tolist(), dtype=np.int64).reshape(-1, self.num_classes),
            )
            samples = np.bincount(image[mine], (frame["stop"] - frame["start"])[mine].astype(float), minlength=len(ids))
            complete &= samples == need
            about[column] = list(totals)
        return about.assign(n0=rule.n0, n=n)[complete].sort_values("index", ignore_index=True)

    def looks(self) -> pd.DataFrame:
        """One row an image, with its blocks in order up to the first that is missing: what a sequential rule may count.

        Returns
        -------
        DataFrame with index, key, image_id, label, selection and estimation (int64 arrays [blocks done, num_classes],
        not cumulative), sorted by index.
        """
        blocks_of = {
            SELECT: list(itertools.pairwise(block_edges(self.stopping_rule.n0))),
            ESTIMATE: list(itertools.pairwise(self.stopping_rule.edges())),
        }
        rows = []
        for about, mine in self.rows().groupby(["index", "key", "image_id", "label"], sort=True):
            counted = {
                (p, a, b): c for p, a, b, c in mine[["purpose", "start", "stop", "counts"]].itertuples(index=False)
            }
            prefixes = []
            for purpose, blocks in blocks_of.items():
                known = (counted.get((purpose, a, b)) for a, b in blocks)
                done = list(itertools.takewhile(lambda c: c is not None, known))
                prefixes.append(np.array(done, dtype=np.int64).reshape(-1, self.num_classes))
            rows.append((*about, *prefixes))
        return pd.DataFrame(rows, columns=["index", "key", "image_id", "label", "selection", "estimation"])

    def edges(self) -> list[int]:
        """Values of n at which counts can be read."""
        return self.stopping_rule.edges()[1:]

    def _name(self) -> str:
        return str(self.path or "record in memory")


def create_record(path: str | os.PathLike | None, identity: Identity, class_names: tuple[str, ...] = ()) -> Record:
    """Start a record, or go on with the one that is there if its identity agrees.

    Raises
    ------
    RecordError
        If the folder holds the record of another run, or something else.
    """
    if path is None:
        return Record(None, identity, class_names)
    path = Path(path)
    if (path / "run.json").is_file():
        record = open_record(path)
        differences = record.identity.differences(identity)
        if differences:
            raise RecordError(
                f"{path} is the record of another run: this one has {'; '.join(differences)}. "
                f"Give another folder, or the settings of that run."
            )
        return record
    ours = re.compile(r"parts|\.run\.json\..*\.tmp")  # of a run that was killed before its description was there
    if path.exists() and (not path.is_dir() or any(not ours.fullmatch(p.name) for p in path.iterdir())):
        raise RecordError(f"{path} exists and is no record; give a new or empty folder")
    (path / "parts").mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "identity": dataclasses.asdict(identity), "class_names": list(class_names)}
    about["sha256"] = _digest_of_description(about)
    write_atomically(path / "run.json", lambda file: file.write((json.dumps(about, indent=2) + "\n").encode()))
    return Record(path, identity, class_names)


def open_record(path: str | os.PathLike) -> Record:
    """Read a record's description; rows are read when asked for."""
    path = Path(path)
    if not (path / "run.json").is_file():
        raise RecordError(
            f"{path} is no vote record: it has no run.json; records are made by `smoothkit certify --out FOLDER`"
        )
    known = read_json(path / "run.json", format=int)["format"]
    if known != FORMAT:
        raise RecordError(
            f"{path / 'run.json'} has record format {known}, this version reads {FORMAT}; update smoothkit, or {COPY}"
        )
    about = read_json(path / "run.json", identity=dict, class_names=list)
    if about.get("sha256", _digest_of_description(about)) != _digest_of_description(about):
        raise RecordError(f"{path / 'run.json'} does not fit its checksum; {COPY}")
    return Record(path, _identity(about["identity"], str(path / "run.json"), COPY), tuple(about["class_names"]))


def _identity(fields: dict[str, Any], where: str, remedy: str) -> Identity:
    try:
        return Identity.from_json(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the identity in {where} cannot be read ({error}); {remedy}") from None
