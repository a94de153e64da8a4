"""Bad input for the public functions, the command line and the log reader: `make fuzz`.

The properties are in `properties`, a file for each room. This tries many inputs and keeps how many; the tests try few.
"""

import argparse
import multiprocessing
import sys
import time

from fuzz_logs import fuzz_logs
from properties import PROPERTIES, REFUSALS, TRIED
from results import keep, read


def run_properties(examples: int) -> list[dict]:
    """Every property with about so many inputs: what was tried, refused, and what did not hold."""
    found = []
    for name, run in PROPERTIES.items():
        TRIED[name] = REFUSALS[name] = 0
        problem = ""
        try:
            run(examples)
        except Exception as error:  # hypothesis gives the smallest input that it found
            problem = f"{type(error).__name__}: {error}"[:600]
        found.append({"property": name, "tried": TRIED[name], "refused": REFUSALS[name], "problem": problem})
    return found


def _logs(part: tuple[int, int, float]) -> dict:
    number, seed, seconds = part
    return fuzz_logs(number, seed, time.perf_counter() + seconds)


def _all_logs(number: int, jobs: int, seconds: float) -> tuple[dict[str, int], list]:
    """How many logs were tried, read and refused, and those that were read wrongly."""
    share = -(-number // jobs)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        parts = pool.map(_logs, [(share, seed, seconds) for seed in range(jobs)])
    counted = {name: sum(part[name] for part in parts) for name in ("tried", "read", "refused")}
    return counted, [w for part in parts for w in part["wrong"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="inputs for each property")
    parser.add_argument("--logs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=400, help="for the logs, at the most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--keep-logs", action="store_true", help="try no logs, and keep what the last run found of them"
    )
    chosen = parser.parse_args()
    begin = time.perf_counter()
    if chosen.keep_logs:
        last = read("fuzz")
        logs, wrong = {**last["logs"], "of": "an earlier run"}, last["logs_read_wrongly"]
    else:
        logs, wrong = _all_logs(chosen.logs, chosen.jobs, chosen.seconds)
    properties = run_properties(chosen.examples)
    broken = [p for p in properties if p["problem"]]
    tried = logs["tried"] + sum(p["tried"] for p in properties)
    silent = len(wrong) + len(broken)
    keep(
        "fuzz",
        begin,
        {
            "made_by": "make fuzz",
            "headline": f"{tried:,} inputs tried, {logs['tried']:,} of them mutated logs; {silent} silent errors",
            "tried": tried,
            "silent_errors": silent,
            "logs": logs,
            "logs_read_wrongly": wrong[:20],
            "properties": properties,
        },
    )
    sys.exit(bool(wrong or broken))


if __name__ == "__main__":
    main()
