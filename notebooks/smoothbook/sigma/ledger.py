"""An append-only file of entries of one size, in a chain of digests, with one writer at a time.

A ledger is a folder:

    ledger.json   what it is about, written once; its digest begins the chain
    entries.bin   entry after entry: the payload, then the digest of (digest before, payload)
    head.json     number of entries and last digest, replaced by rename after every append
    lock          held while a process has the ledger open

An entry counts once `head.json` says so. A process killed in the middle of an append leaves at most entries that
nobody was told of: whole ones are kept, a torn one is cut off. An entry that was changed, removed or moved breaks the
chain, and a file shorter than its head has lost some; both are refused. Whoever puts back an older copy of the whole
folder is found out by a `Receipt` kept elsewhere. The digests have no key: they find accidents, and forgers only with
a receipt.
"""

import dataclasses
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from smoothkit.records import read_json, write_atomically

FORMAT = 1
DIGEST = 32  # bytes


class LedgerError(ValueError):
    """A ledger that cannot be used as it is; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Proof that a ledger held `entries` entries, the last of which had this digest (hexadecimal)."""

    entries: int
    digest: str


class Ledger:
    """The ledger in `folder`, made if there is none; with `folder=None` it lives in memory only.

    Parameters
    ----------
    folder : path or None
    about : dict of JSON values
        What the entries are about; must be equal to open a ledger again.
    size : int
        Bytes of an entry's payload.
    receipt : Receipt, optional
        The ledger must have held this; refuses one that was put back to an earlier state.

    Raises
    ------
    LedgerError
        If the ledger is about something else, in use, damaged or shorter than it was.
    """

    def __init__(
        self, folder: str | os.PathLike | None, about: dict[str, Any], *, size: int, receipt: Receipt | None = None
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._size, self._step = size, size + DIGEST
        self._process, self._lock, self._file = os.getpid(), None, None
        self._serial = threading.Lock()
        start = _digest(b"", json.dumps({"format": FORMAT, **about}, sort_keys=True).encode())
        self._digests = [start]  # after 0, 1, 2, ... entries
        self.found: list[bytes] = []  # payloads that were there
        try:
            if self.folder is not None:
                self._open(about)
            if receipt is not None:
                self._check_receipt(receipt)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._digests) - 1

    @property
    def receipt(self) -> Receipt:
        """What to keep elsewhere to find out whether entries were lost."""
        return Receipt(len(self), self._digests[-1].hex())

    def append(self, payloads: Sequence[bytes]) -> None:
        """Add entries; they are on the disk when this returns, all or (as far as anybody is told) none."""
        if any(len(p) != self._size for p in payloads):
            raise ValueError(f"entries must have {self._size} bytes, got {sorted({len(p) for p in payloads})}")
        with self._serial:
            digests = [self._digests[-1]]
            for payload in payloads:
                digests.append(_digest(digests[-1], payload))
            if self.folder is not None and payloads:
                self._check_writable()
                try:
                    self._file.write(b"".join(p + d for p, d in zip(payloads, digests[1:], strict=True)))
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._write_head(len(self) + len(payloads), digests[-1])
                except BaseException:  # as a full disk; what is there now is found out by opening it again
                    self.close()
                    raise
            self._digests.extend(digests[1:])

    def close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()  # which gives back the lock
        self._file = self._lock = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, about: dict[str, Any]) -> None:
        description = self.folder / "ledger.json"
        if self.folder.exists() and not description.is_file() and _holds_something(self.folder):
            raise LedgerError(
                f"{self.folder} holds no ledger.json; restore it from a copy, or give a new or empty folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "a+b")  # noqa: SIM115 (held until close)
        _take(self._lock, self.folder)
        if description.is_file():
            self._check_about(description, about)
        else:  # the description comes last: a folder without one is not begun
            (self.folder / "entries.bin").touch()
            self._write_head(0, self._digests[0])
            _replace(description, {"format": FORMAT, "about": about})
        told = self._read()
        self._file = open(self.folder / "entries.bin", "r+b")  # noqa: SIM115
        self._file.truncate(len(self) * self._step)
        if told != len(self):
            self._write_head(len(self), self._digests[-1])

    def _check_about(self, description: Path, about: dict[str, Any]) -> None:
        there = read_json(description, LedgerError, format=int, about=dict)
        known, found = there["format"], there["about"]
        if known != FORMAT:
            raise LedgerError(f"{self.folder} has ledger format {known}, this version reads {FORMAT}; update smoothkit")
        wanted = json.loads(json.dumps(about))
        different = [
            f"{k} {found.get(k)!r} instead of {wanted.get(k)!r}"
            for k in sorted(found.keys() | wanted.keys())
            if found.get(k) != wanted.get(k)
        ]
        if different:
            raise LedgerError(f"{self.folder} is of another kind: it has {'; '.join(different)}; give another folder")

    def _read(self) -> int:
        """Find the entries; returns how many of them somebody was told of."""
        try:
            head = read_json(self.folder / "head.json", LedgerError, entries=int, digest=str)
            data = (self.folder / "entries.bin").read_bytes()
        except OSError as error:
            raise LedgerError(f"{self.folder} is incomplete ({error}); restore it from a copy") from None
        told, digest = head["entries"], head["digest"]
        if told < 0:
            raise LedgerError(f"{self.folder / 'head.json'} counts {told} entries; restore the ledger from a copy")
        there = len(data) // self._step
        if told > there:
            raise LedgerError(
                f"{self.folder} has lost entries: {there} are there, and {told} were; restore it from a copy, since "
                f"what was promised for the others cannot be kept without them"
            )
        for i in range(there):
            entry = data[i * self._step : (i + 1) * self._step]
            after = _digest(self._digests[-1], entry[: self._size])
            if after != entry[self._size :]:
                if i >= told:
                    break
                raise LedgerError(f"entry {i} of {self.folder} was changed, moved or removed; restore it from a copy")
            self._digests.append(after)
            self.found.append(entry[: self._size])
        if self._digests[told].hex() != digest:
            raise LedgerError(f"{self.folder} does not end as its head.json says; restore both from one copy")
        if len(data) > len(self) * self._step:
            warnings.warn(
                f"{self.folder} ended in a torn entry that no answer was given for; it is cut off", stacklevel=5
            )
        return told

    def _check_receipt(self, receipt: Receipt) -> None:
        kept = self._digests[receipt.entries].hex() if receipt.entries < len(self._digests) else None
        if kept != receipt.digest:
            what = f"has {len(self)} entries" if kept is None else "held something else at that point"
            raise LedgerError(
                f"{self.folder or 'the ledger'} {what}, and the receipt is for {receipt.entries}; it was put back to an "
                f"earlier state or is another one: restore the newest copy"
            )

    def _check_writable(self) -> None:
        if self._file is None:
            raise LedgerError(f"{self.folder} is closed; open it again")
        if os.getpid() != self._process:
            raise LedgerError(
                f"{self.folder} was opened by another process, of which this is a copy; one writes at a time"
            )
        end, found = len(self) * self._step, self._file.seek(0, os.SEEK_END)
        if found != end:
            raise LedgerError(f"{self.folder} was changed by someone else: {found} bytes, expected {end}; open it anew")

    def _write_head(self, entries: int, digest: bytes) -> None:
        _replace(self.folder / "head.json", {"entries": entries, "digest": digest.hex()})


def _digest(before: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(before + payload, digest_size=DIGEST).digest()


def _holds_something(folder: Path) -> bool:
    """Whether a folder without ledger.json is more than what a process killed while making one leaves behind."""
    if not folder.is_dir():
        return True
    others = [p for p in folder.iterdir() if p.name not in ("lock", "head.json") and p.suffix != ".tmp"]
    return any(p.name != "entries.bin" or p.stat().st_size for p in others)


def _take(lock: BinaryIO, folder: Path) -> None:
    """Lock the file for as long as it is open; the system lets go of it when the process ends, however it ends."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LedgerError(
            f"{folder} is open elsewhere; one writes at a time, so close it there, or send the queries through that process"
        ) from None


def _replace(final: Path, content: dict[str, Any]) -> None:
    write_atomically(final, lambda file: file.write(json.dumps(content, indent=1).encode()))
