"""What the engine saves over the plain published loop, and over ART."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence

import pandas as pd

from smoothbook.bench import engine
from smoothbook.bench.engine import N0, Prepared
from smoothbook.bench.measure import Result, clock, in_a_process, interleaved, method, spread, torch_threads
from smoothbook.bench.peers import ART_MISSING, PLAIN_BATCHES, art_certify, plain_certify

ART_IMPORT = 15.0  # seconds it may take; a quick run has no more to spare


def loop(
    *,
    quick: bool = False,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    least: int | None = None,
    until: float | None = None,
    compiled: bool | None = None,
) -> Result:
    """The plain published loop, and ART, over the engine: one image, the same n0 and n, a sample's cost in each.

    The engine's cost is that of its steady state, which is what counts at n = 100,000: streams are made and
    compiled before, and that is timed apart (`setups` in the file), with the samples after which compiling pays.

    Parameters
    ----------
    names : networks, of `engine.CASES`
    rounds : int
    seconds : about how long the engine takes each time
    least : samples (n0 + n) at least, so that the plain loop has a full batch
    until : `time.perf_counter()` after which no further network or round is begun
    compiled : False keeps to the network as it is
    """
    names = names or engine.networks_for(quick, device, (engine.HEADLINE,))
    rounds, seconds = rounds or (3 if quick else 5), seconds or (0.5 if quick else 2.5)
    until = until or (time.perf_counter() + 34 if quick else None)
    least = least or (500 if quick else 1_100)  # n0 and a full batch of the plain loop's
    compiled, left_out = engine.whether_to_compile(device, compiled)
    rows, setups = [], []
    with torch_threads(1):
        for name in names:
            if rows and until and time.perf_counter() > until:
                left_out.append(f"{name} is left out: no time left")
                continue
            engines = _engines(name, device, compiled, quick, left_out)
            race = _race(name, device, engines, rounds, seconds, least, until, left_out)
            rows += _rows(race)
            setups += _setups(race)
        if compiled and not quick and not any(s["compiled anew"] for s in setups if s["engine"] == "float32"):
            setups.append(_cold_setup(names[0], device, setups))
    table = pd.DataFrame(rows)
    head = table[(table.network == names[0]) & (table.peer == _plain(PLAIN_BATCHES[0]))].set_index("engine")["ratio"]
    return Result(
        table,
        float(head["float32"]),
        f"the plain loop (batch {PLAIN_BATCHES[0]}) over the engine, {names[0]}, float32 on both sides",
        method(device),
        others={short: float(head[p]) for p, short in engine.SHORT_NAMES.items() if p in head},
        extra={"setups": setups},
        left_out=tuple(left_out),
    )


def _engines(name: str, device: str, compiled: bool, quick: bool, left_out: list[str]) -> dict[str, Prepared]:
    """The engine in every form it is raced in; the first is the headline's."""
    engines = {"float32": engine.prepared(name, "float32", device, compiled)}
    cold = quick and engines["float32"].compiled_anew
    if cold:
        left_out.append(engine.COLD_CACHE)
    if compiled and not quick:
        engines["float32, not compiled"] = engine.prepared(name, "float32", device, False)
    # the headline's network in any case: a ratio below one is an answer too
    short = name == engine.HEADLINE and not quick
    precisions = ("bfloat16",) if short else engine.short_precisions(device, left_out)
    for precision in (*precisions, *(("tf32",) if device == "cuda" else ())):
        engines[precision] = engine.prepared(name, precision, device, compiled and not cold)
    return engines


# --- the race ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds a sample, [rounds x variants], and the samples (n0 + n) of each variant's runs; the others are peers."""

    network: str
    engines: dict[str, Prepared]
    seconds: pd.DataFrame
    samples: dict[str, int]


def _race(
    name: str,
    device: str,
    engines: dict[str, Prepared],
    rounds: int,
    seconds: float,
    least: int,
    until: float | None,
    left_out: list[str],
) -> Race:
    """Peers and engines in turn. A slower form of the engine draws fewer samples, whole batches of them."""
    now = clock(device)
    samples = {
        label: engine.batches_for(ready.stream, engine.bare_forward(ready.stream), now, seconds) * ready.stream.batch
        for label, ready in engines.items()
    }
    batch = engines["float32"].stream.batch
    samples["float32"] = max(samples["float32"], -(-least // batch) * batch)
    both = samples["float32"] >= sum(PLAIN_BATCHES[1:], N0)
    hurry = until is not None and time.perf_counter() > until - ART_IMPORT
    runs, line = _peers(engine.CASES[name], device, samples["float32"] - N0, both=both, art=not hurry)
    left_out += [line] if line and line not in left_out else []
    samples |= dict.fromkeys(runs, samples["float32"])
    for label, ready in engines.items():
        runs[label] = functools.partial(engine.certify_with, ready.stream, n0=N0, n=samples[label] - N0)
    times = interleaved(runs, rounds=rounds, now=now, until=until)
    return Race(name, engines, times / pd.Series(samples), samples)


def _peers(
    case: engine.Case, device: str, n: int, *, both: bool, art: bool
) -> tuple[dict[str, Callable[[], object]], str | None]:
    """What to time of the peers, warmed up: the plain loop (`both`: also at the larger batch), and ART or why not."""
    base_classifier, image = case.make().to(device), engine.images_for(case)[0]
    common = dict(sigma=engine.SIGMA, n0=N0, alpha=engine.ALPHA, num_classes=case.num_classes)
    on_device = image.to(device)
    runs = {
        _plain(batch): functools.partial(plain_certify, base_classifier, on_device, n=n, batch=batch, **common)
        for batch in (PLAIN_BATCHES if both else PLAIN_BATCHES[:1])
    }
    plain_certify(base_classifier, on_device, n=1, batch=N0, **common)
    if not art:
        return runs, "ART is left out: no time left to import it"
    try:
        certify = art_certify(base_classifier, case.size, batch=PLAIN_BATCHES[0], device=device, **common)
    except ImportError:
        return runs, ART_MISSING
    certify(image.numpy(), 1)
    return runs | {"ART": lambda: certify(image.numpy(), n)}, None


def _plain(batch: int) -> str:
    return f"plain loop, batch {batch}"


def _rows(race: Race) -> list[dict]:
    each = race.seconds * 1e6
    return [
        {
            "network": race.network, "peer": peer, "engine": label, "road": ready.stream.road, "batch": ready.stream.batch,
            "n": race.samples[label] - N0, "rounds": len(each), "peer us": float(each[peer].median()),
            "engine us": float(each[label].median()), **spread("ratio", each[peer] / each[label]),
        }
        for peer in each.columns.difference(list(race.engines), sort=False)
        for label, ready in race.engines.items()
    ]  # fmt: skip


# --- what a stream costs to make ---------------------------------------------------------------------


def _setups(race: Race) -> list[dict]:
    """What each stream cost to make; for a compiled one, the samples after which that is won back."""
    found = [_setup(race.network, label, ready) for label, ready in race.engines.items()]
    for setup in found:
        setup["s per 100,000 samples"] = float(race.seconds[setup["engine"]].median()) * engine.PUBLISHED_N
    if "float32, not compiled" in race.engines:
        won = float((race.seconds["float32, not compiled"] - race.seconds["float32"]).median())
        spent = found[0]["setup wall s"] - found[1]["setup wall s"]
        found[0] |= {"won per sample s": won, "pays after samples": _pays_after(spent, won)}
    return found


def _setup(name: str, label: str, ready: Prepared) -> dict:
    return {
        "network": name, "engine": label, "road": ready.stream.road, "setup wall s": ready.wall_seconds,
        "setup cpu s": ready.cpu_seconds, "compiled anew": ready.compiled_anew,
    }  # fmt: skip


def _pays_after(seconds: float, won_per_sample: float) -> float | None:
    """Samples until `seconds` are won back; None if never."""
    return max(0.0, seconds) / won_per_sample if won_per_sample > 0 else None


def _cold_setup(name: str, device: str, setups: list[dict]) -> dict:
    """What making a compiled stream costs where the compiler has nothing in its cache, and when that is won back."""
    with tempfile.TemporaryDirectory() as empty:
        cold = in_a_process(_child_setup, name, device, environment={"TORCHINDUCTOR_CACHE_DIR": empty})
    known = {s["engine"]: s for s in setups if s["network"] == name}
    spent = cold["setup wall s"] - known["float32, not compiled"]["setup wall s"]
    return cold | {"pays after samples": _pays_after(spent, known["float32"]["won per sample s"])}


def _child_setup(name: str, device: str) -> dict:
    with torch_threads(1):
        return _setup(name, "float32, cold cache", engine.prepared(name, "float32", device, True))
