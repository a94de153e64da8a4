"""Where the results of `make faults`, `make coverage` and `make fuzz` are kept: data/trust/NAME.json."""

import json
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "data" / "trust"


def keep(name: str, begin: float, about: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a result with machine, versions, the command that makes it and the seconds since `begin` (perf_counter)."""
    from smoothbook.bench.measure import circumstances  # seconds of imports, that children need not wait for

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {**circumstances("cpu"), "seconds": round(time.perf_counter() - begin, 1), **about}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"saved {path.name}: {about['headline']}")
    return path


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())
