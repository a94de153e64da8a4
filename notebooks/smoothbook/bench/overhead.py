"""What the engine adds to the bare network."""

import time
from collections.abc import Sequence

import pandas as pd

from smoothbook.bench import engine
from smoothbook.bench.engine import N0, Prepared
from smoothbook.bench.measure import Result, clock, interleaved, method, spread, torch_threads


def overhead(
    *,
    quick: bool = False,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    until: float | None = None,
    compiled: bool | None = None,
) -> Result:
    """Certifying by the engine over the bare network on as many full batches; both by one road.

    n0 + n fills the engine's batches, as it all but does at n = 100,000. Making the stream is not timed.
    """
    names = names or engine.networks_for(quick, device, ("digits-vit", "resnet20"))
    rounds, seconds = rounds or (7 if quick else 15), seconds or (0.4 if quick else 1.5)
    until = until or (time.perf_counter() + 28 if quick else None)
    compiled, left_out = engine.whether_to_compile(device, compiled)
    precisions = precisions or ("float32", *engine.short_precisions(device, left_out))
    rows = []
    with torch_threads(1):
        for precision in precisions:
            for name in names:
                if rows and until and time.perf_counter() > until:
                    left_out.append(f"{name} in {precision} is left out: no time left")
                    continue
                ready = engine.prepared(name, precision, device, compiled)
                rows.append({"network": name, "precision": precision, **_overhead_of(ready, device, rounds, seconds)})
                if quick and ready.compiled_anew:
                    compiled = False
                    left_out.append(engine.COLD_CACHE)
    table = pd.DataFrame(rows)
    worst = {p: float(group["ratio"].max()) for p, group in table.groupby("precision")}
    first = precisions[0]
    return Result(
        table,
        worst[first],
        f"certifying over the bare forward pass, the worst of {', '.join(table.network.unique())} in {first}",
        method(device),
        others={engine.SHORT_NAMES.get(p, p): ratio for p, ratio in worst.items() if p != first},
        left_out=tuple(left_out),
    )


def _overhead_of(ready: Prepared, device: str, rounds: int, seconds: float) -> dict:
    stream, forward, now = ready.stream, engine.bare_forward(ready.stream), clock(device)
    batches = engine.batches_for(stream, forward, now, seconds)
    samples = batches * stream.batch
    variants = {
        "engine": lambda: engine.certify_with(stream, n0=N0, n=samples - N0),
        "forward": lambda: forward(batches),
    }
    times = interleaved(variants, rounds=rounds, now=now)
    return {
        "road": stream.road,
        "batch": stream.batch,
        "n": samples - N0,
        "rounds": len(times),
        "forward us": float(times["forward"].median()) / samples * 1e6,
        "engine us": float(times["engine"].median()) / samples * 1e6,
        **spread("ratio", times["engine"] / times["forward"]),
    }
