"""Break certifying runs on purpose, and go on with them: `make faults`.

Each trial starts a small run in a child process (forked from this one, or a fresh interpreter), does it harm at a random
moment, and resumes. It survives if the final counts are those of an undisturbed run, if no more samples were drawn a second
time than one block has (besides those of a file that was damaged), and if damage was named. A changed byte that changes
nothing that is read needs no naming.
"""

import argparse
import collections
import contextlib
import errno
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import keep

from smoothbook import cli
from smoothkit import data
from smoothkit.records import Record, RecordError, open_record
from smoothkit.records import record as records
from smoothkit.sampling import batches
from smoothkit.sampling import run as sampling_run
from smoothkit.types import StoppingRule

RULE = StoppingRule(n0=100, n=1_500, alpha=0.001)
BLOCK = 900  # samples of the largest block
IMAGES = 5
PAUSE = 0.001  # seconds a batch, so that there are moments to be hit
NOBODY = 65534


class Slow(torch.nn.Module):
    """A linear classifier that takes its time."""

    def __init__(self, pause: float = PAUSE) -> None:
        super().__init__()
        self.pause = pause
        self.register_buffer("w", torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause)
        return images.flatten(1) @ self.w


class KilledOnce(Slow):
    """The first worker that runs it once something is kept under `folder` is killed in the middle of its work."""

    def __init__(self, folder: Path) -> None:
        super().__init__(pause=0)
        self.folder, self.home = folder, os.getpid()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.home and any(self.folder.glob("*/parts/*")):
            with contextlib.suppress(FileExistsError):
                mark = os.open(self.folder / "killed", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                os.write(mark, str(os.getpid()).encode())
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Drawn:
    """How many samples were drawn, by this process and those it forked."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)
        step = batches.Step.__call__

        def counted(self_, plan, first_task):
            step(self_, plan, first_task)
            self._shared[:] = struct.pack("<q", self.samples + plan.used)

        batches.Step.__call__ = counted

    @property
    def samples(self) -> int:
        return struct.unpack("<q", self._shared[:])[0]


def certify(out: Path, pause: float = PAUSE) -> Record:
    """The small run."""
    return sampling_run.collect_votes(
        Slow(pause), data.load("digits", subset=f"first:{IMAGES}"), sigma=0.25, stopping_rule=RULE, out=out,
        batch=100, compile=False, progress=False,
    )  # fmt: skip


def counts(record: Record) -> list:
    table = record.votes()
    columns = ["image_id", "label", "counts_selection", "counts_estimation"]
    return [tuple(np.asarray(v).tolist() for v in row) for row in table[columns].itertuples(index=False)]


# --- children ----------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    """A child that does the work and ends with status 0, or with 1 after an error that it prints nothing about."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return child


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def hit(child: int, sign: int, after: float) -> None:
    """A signal at a random moment, or none if the child has finished before."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        if ended(child):
            return
        time.sleep(0.002)
    os.kill(child, sign)
    os.waitpid(child, 0)


class Bench:
    """The folder, the random numbers and the undisturbed run that trials share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.drawn = folder, np.random.default_rng(seed), Drawn()
        certify(folder / "warm")
        before, begin = self.drawn.samples, time.perf_counter()
        self.expected = counts(certify(folder / "undisturbed"))
        self.seconds = time.perf_counter() - begin
        self.samples = self.drawn.samples - before

    def moment(self) -> float:
        return float(self.rng.uniform(0, 1.1 * self.seconds))


# --- faults: each breaks a run in `out`; returns samples it may cost besides a block, and whether damage was named -----


def by_signal(sign: int) -> Callable:
    def fault(bench: Bench, out: Path):
        def work():
            cli.stop_on_sigterm()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            certify(out)

        hit(fork(work), sign, bench.moment())
        return 0, None

    return fault


def file_size_limit(bench: Bench, out: Path):
    """What a full disk does: a write ends in the middle."""
    limit = int(bench.rng.integers(300, 10_000))

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        certify(out)

    os.waitpid(fork(work), 0)
    return 0, None


def no_space(bench: Bench, out: Path):
    """ENOSPC from the k-th write on."""
    left = int(bench.rng.integers(0, 40))

    def work():
        real_write, real_table, remaining = os.write, records.pq.write_table, [left]

        def full(real):
            def write(*args, **kwargs):
                remaining[0] -= 1
                if remaining[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **kwargs)

            return write

        records.os.write, records.pq.write_table = full(real_write), full(real_table)
        certify(out)

    os.waitpid(fork(work), 0)
    return 0, None


def read_only(bench: Bench, out: Path):
    """The folder loses its write permission; root, whom that does not bind, becomes somebody else first."""

    def work():
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        certify(out)

    hit(fork(lambda: certify(out)), signal.SIGKILL, bench.moment())
    if not (out / "parts").is_dir():
        return 0, None
    modes = {path: path.stat().st_mode for path in (out, out / "parts")}
    for path in modes:
        path.chmod(0o555)
    _, status = os.waitpid(fork(work), 0)
    for path, mode in modes.items():
        path.chmod(mode)
    finished = len(open_record(out).rows()) == len(open_record(bench.folder / "undisturbed").rows())
    return 0, "named" if os.waitstatus_to_exitcode(status) == 1 or finished else "not named"


def damage(change: Callable[[np.random.Generator, bytes], bytes]) -> Callable:
    """A file of an interrupted run is changed; the record must name it, or read as it did before."""

    def fault(bench: Bench, out: Path):
        hit(fork(lambda: certify(out)), signal.SIGKILL, bench.moment())
        if bench.rng.random() < 0.5:  # some of it in a part
            hit(fork(lambda: certify(out)), signal.SIGINT, bench.moment() / 2)
        files = [p for p in (*out.glob("parts/*"), out / "run.json") if p.is_file() and p.stat().st_size]
        if not files or not (out / "run.json").is_file():
            return 0, None
        path = files[int(bench.rng.integers(len(files)))]
        before, known = path.read_bytes(), open_record(out).rows()
        path.write_bytes(change(bench.rng, before))
        try:
            now = open_record(out)
            now.provenance()
            after = now.rows()
        except RecordError as error:
            named = path.name in str(error)
            _repair(path, before)
            return BLOCK * IMAGES * 2, "named" if named else "not named"
        same = after.merge(known, how="left", indicator=True)  # rows it still has are those it had
        intact = bool((same["_merge"] == "both").all())
        if path.name == "run.json" and now.identity != _original(path, before, out).identity:
            intact = False
        if not intact:
            _repair(path, before)
        return BLOCK * IMAGES * 2, "harmless" if intact else "not named"

    return fault


def _original(path: Path, before: bytes, out: Path) -> Record:
    """The record as it was before its description was changed."""
    after = path.read_bytes()
    path.write_bytes(before)
    try:
        return open_record(out)
    finally:
        path.write_bytes(after)


def _repair(path: Path, before: bytes) -> None:
    """As the message says: a description from its copy; anything else is moved away and drawn again."""
    if path.name == "run.json":
        path.write_bytes(before)
    else:
        path.unlink()


def cut_short(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(len(content)))]


def flipped_bit(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def clock_backwards(bench: Bench, out: Path):
    """Every look at the clock finds it an hour earlier, and files bear times that are still to come."""

    def work():
        now = [time.time()]

        def earlier(*_):
            now[0] -= 3600
            return now[0]

        gmtime = time.gmtime
        time.time, time.gmtime = earlier, lambda *_: gmtime(earlier())
        certify(out)

    hit(fork(work), signal.SIGKILL, bench.moment())
    for path in out.glob("parts/*"):
        os.utime(path, (time.time() + 1e6,) * 2)
    return 0, None


def two_writers(bench: Bench, out: Path):
    """Two processes on one record, one of which is killed: they may draw the same twice, and nothing is counted twice."""
    first, second = (fork(lambda: certify(out)) for _ in range(2))
    hit(first, signal.SIGKILL, bench.moment())
    os.waitpid(second, 0)
    return 2 * bench.samples, None


def fresh(sign: int) -> Callable:
    """The same in an interpreter of its own."""

    def fault(bench: Bench, out: Path):
        child = subprocess.Popen([sys.executable, __file__, "--child", str(out)], stderr=subprocess.DEVNULL)
        while not (out / "run.json").exists() and child.poll() is None:
            time.sleep(0.005)
        time.sleep(bench.moment())
        child.send_signal(sign)
        child.wait()
        return bench.samples, None  # its samples are not counted here

    return fault


FAULTS: dict[str, Callable] = {
    "SIGKILL": by_signal(signal.SIGKILL),
    "SIGTERM": by_signal(signal.SIGTERM),
    "Ctrl-C": by_signal(signal.SIGINT),
    "full disk (file size limit)": file_size_limit,
    "full disk (ENOSPC)": no_space,
    "read-only folder": read_only,
    "file cut short": damage(cut_short),
    "flipped bit": damage(flipped_bit),
    "clock backwards": clock_backwards,
    "two writers": two_writers,
}
FRESH = {
    "SIGKILL, fresh interpreter": fresh(signal.SIGKILL),
    "SIGTERM, fresh interpreter": fresh(signal.SIGTERM),
    "Ctrl-C, fresh interpreter": fresh(signal.SIGINT),
}


def trial(bench: Bench, kind: str, fault: Callable, out: Path) -> dict:
    """One fault, and the run that goes on after it."""
    before = bench.drawn.samples
    try:
        allowed, named = fault(bench, out)
        kept = len(open_record(out).rows()) if (out / "run.json").is_file() else 0
        final = counts(certify(out, pause=0))
        problem = "" if final == bench.expected else "the final counts differ"
    except Exception as error:  # whatever a fault may bring about is a finding
        said = f"{type(error).__name__}: {error}"[:300]
        return {"kind": kind, "kept": 0, "again": 0, "problem": said, "damage": None}
    again = bench.drawn.samples - before - bench.samples
    if not problem and again > BLOCK + allowed:
        problem = f"{again} samples were drawn a second time"
    if not problem and named == "not named":
        problem = "the damage was not named"
    return {"kind": kind, "kept": kept, "again": max(0, again), "problem": problem, "damage": named}


def run(trials: int, in_fresh: int, folder: Path, seed: int = 0) -> list[dict]:
    """`trials` faults in turn, of which `in_fresh` in fresh interpreters."""
    torch.set_num_threads(1)
    bench, found = Bench(folder, seed), []
    for kinds, number in ((FAULTS, trials - in_fresh), (FRESH, in_fresh)):
        for i in range(number):
            kind = list(kinds)[i % len(kinds)]
            found.append(trial(bench, kind, kinds[kind], folder / f"{len(found)}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--fresh", type=int, default=20, help="of them in fresh interpreters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        cli.stop_on_sigterm()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if the parent is a background job
        certify(options.child)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.trials, options.fresh, Path(folder), options.seed)
    injected = collections.Counter(t["kind"] for t in found)
    lost = [t for t in found if t["problem"]]
    rows = [
        {
            "fault": kind,
            "injected": number,
            "survived": number - sum(t["kind"] == kind for t in lost),
            "blocks kept, mean": round(float(np.mean([t["kept"] for t in found if t["kind"] == kind])), 1),
            "samples again, most": max(t["again"] for t in found if t["kind"] == kind),
        }
        for kind, number in injected.items()
    ]
    lost_counts = sum("counts" in t["problem"] for t in lost)
    keep(
        "faults",
        begin,
        {
            "made_by": "make faults",
            "headline": f"{len(found) - len(lost)} of {len(found)} faults survived, counts lost: {lost_counts}",
            "injected": len(found),
            "survived": len(found) - len(lost),
            "counts_lost": lost_counts,
            "damage": dict(collections.Counter(t["damage"] for t in found if t["damage"])),
            "fresh_interpreters": options.fresh,
            "largest_block": BLOCK,
            "seed": options.seed,
            "rows": rows,
            "problems": lost,
        },
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
