"""Certification logs, mutated; the reader is compared with the slow one."""

import contextlib
import math
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from slow_logs import slow_read

from smoothkit.reading import LogError, read_log

SECONDS = 20  # after which reading a log of a few lines counts as a hang
LOGS = [
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.978\t1\t15.4\n20\t7\t-1\t0.0\t0\t0:00:14.2\n40\t1\t2\t0.125\t0\t15.6\n",
    "idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t15.4\n20\t7\t-1\t0\t14.2\n40\t1\t2\t0\t15.6\n",
    "idx label predict radius correct\n1 2 2 0.5 1\n2 4 4 0.25 2\n3 4 -2 -0.25 2\n",
    "original_idx,original_label,predicted_class,epsilon_value,correct\n5,1,1,0.333,True\n6,0,1,0.1,False\n7,1,1,0.7,True\n",
    "idx\tlabel\tpredict\tradius\tcorrect\tsigma\ttime\n0\tcat\tcat\t0.5\t1\t0.25\t1\n1\tdog\tcat\t0.25\t0\t0.25\t1\n2\tdog\t-1\t0\t0\t0.25\t1\n",
    "idx\tlabel\tpredict\tpA samplesize\tradius\tcorrect\ttime\n0\t3\t3\t0.9 100\t1.0\t1\t1\n9\t3\t3\t0.9 100\t0.5\t1\t1\nmean 1.0\n",
    "idx \t label \t predict \t l2_radius \t correct\n 0 \t 1 \t 1 \t 0.4 \t 1\n 1 \t 1 \t -1 \t -0.2 \t 0\n",
]
CELLS = [
    "", "nan", "inf", "-inf", "-1", "-2", "0", "1", "3", "1e3", "1e400", "-1e400", "5.0", "5.5", "1_000", "0x10", "٣", "½",
    "9007199254740993", "99999999999999999999999", "-0", "+4", "1.", ".5", "1e-400", "None", "idx", "label", "True", "a b",
    "γ", "3 ", "1,5", "--1", "1e", "infinity", "-nan",
]  # fmt: skip
WORDS = "0123456789.-+eE \tabcidxlpr\n\r,;é\x0b\x1c\u2028\ufeff\0"


def mutated(rng: np.random.Generator) -> bytes:
    """One of the logs with one to four things wrong with it."""
    text = LOGS[int(rng.integers(len(LOGS)))]
    for _ in range(int(rng.integers(1, 5))):
        text = MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, text)
    raw = text.encode()
    if rng.random() < 0.05 and raw:
        at = int(rng.integers(len(raw)))
        raw = raw[:at] + bytes([int(rng.integers(256))]) + raw[at + 1 :]
        raw = raw.replace(b'"', b"'") if b"," in raw.split(b"\n")[0] else raw  # quoting is the csv module's, in both
    return raw


def _line(rng, text: str) -> tuple[list[str], int]:
    lines = text.split("\n")
    return lines, int(rng.integers(len(lines)))


def _cut(rng, text: str) -> str:
    return text[: int(rng.integers(len(text) + 1))]


def _drop_line(rng, text: str) -> str:
    lines, i = _line(rng, text)
    return "\n".join(lines[:i] + lines[i + 1 :])


def _repeat_line(rng, text: str) -> str:
    lines, i = _line(rng, text)
    return "\n".join(lines[: i + 1] + lines[i:])


def _swap_lines(rng, text: str) -> str:
    lines, i = _line(rng, text)
    j = int(rng.integers(len(lines)))
    lines[i], lines[j] = lines[j], lines[i]
    return "\n".join(lines)


def _change_cell(rng, text: str) -> str:
    lines, i = _line(rng, text)
    separator = "\t" if "\t" in text else "," if "," in text else " "
    cells = lines[i].split(separator)
    cells[int(rng.integers(len(cells)))] = CELLS[int(rng.integers(len(CELLS)))]
    lines[i] = separator.join(cells)
    return "\n".join(lines)


def _one_cell_fewer_or_more(rng, text: str) -> str:
    lines, i = _line(rng, text)
    separator = "\t" if "\t" in text else "," if "," in text else " "
    cells = lines[i].split(separator)
    at = int(rng.integers(len(cells)))
    lines[i] = separator.join(cells[:at] + cells[at + 1 :] if rng.random() < 0.5 else [*cells, CELLS[at % len(CELLS)]])
    return "\n".join(lines)


def _insert(rng, text: str) -> str:
    at, length = int(rng.integers(len(text) + 1)), int(rng.integers(1, 4))
    return text[:at] + "".join(WORDS[int(i)] for i in rng.integers(len(WORDS), size=length)) + text[at:]


def _separator(rng, text: str) -> str:
    return text.replace("\t", [",", " ", "\t\t", ";"][int(rng.integers(4))])


def _line_ends(rng, text: str) -> str:
    return text.replace("\n", ["\r\n", "\r", "\n\n", "\n \n"][int(rng.integers(4))])


def _twice(rng, text: str) -> str:
    return text + text


MUTATIONS = (
    _cut, _drop_line, _repeat_line, _swap_lines, _change_cell, _change_cell, _change_cell, _one_cell_fewer_or_more,
    _insert, _insert, _separator, _line_ends, _twice,
)  # fmt: skip


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_):
        raise TimeoutError(f"reading took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def difference(raw: bytes, path: Path) -> tuple[str, str]:
    """What happened ("read" or "refused"), and what is wrong with that ("" if nothing)."""
    path.write_bytes(raw)
    wanted = slow_read(raw)
    try:
        with no_hang():
            table = read_log(path).table
    except LogError as error:
        told = len(str(error).splitlines()) == 1 and str(path) in str(error)
        return (
            "refused",
            "" if wanted is None and told else f"refused though readable: {error}" if told else f"unclear: {error}",
        )
    except Exception as error:  # anything else is a finding
        return "refused", f"{type(error).__name__}: {error}"
    if wanted is None:
        return "read", "read though it should be refused"
    columns = ("idx", "label", "predict", "radius", "correct")
    found = list(zip(*(table[name].tolist() for name in columns), strict=True))
    return "read", "" if len(found) == len(wanted) and all(
        map(_equal, found, wanted)
    ) else f"{found} instead of {wanted}"


def _equal(row: tuple, wanted: tuple) -> bool:
    radius, slow = row[3], wanted[3]
    same = math.isnan(radius) if slow is None else radius == slow
    return same and (*row[:3], bool(row[4])) == (*wanted[:3], wanted[4])


def fuzz_logs(number: int, seed: int, until: float = math.inf) -> dict:
    """`number` mutated logs, or as many as there is time for: how many were read, refused, and read wrongly."""
    rng, happened, wrong = np.random.default_rng(seed), Counter(), []
    memory = Path("/dev/shm")  # where there is one: a hundred thousand files on a disk take longer than reading them
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "log"
        for _ in range(number):
            if time.perf_counter() > until:
                break
            raw = mutated(rng)
            what, problem = difference(raw, path)
            happened[what] += 1
            if problem:
                wrong.append({"log": raw.decode(errors="replace")[:500], "problem": problem.replace(folder, "")[:300]})
    return {"tried": sum(happened.values()), "read": happened["read"], "refused": happened["refused"], "wrong": wrong}
