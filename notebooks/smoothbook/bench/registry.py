"""The list of benchmarks: what each says, where it is, and whether a GPU has a part in it."""

import dataclasses
import importlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What its ratio says, the module of the function of its name, and whether it also runs on a GPU."""

    says: str
    module: str
    cuda: bool = False

    def function(self, name: str) -> Callable:
        """Imported when it is to run: the command line lists benchmarks without loading torch."""
        return getattr(importlib.import_module(f"smoothbook.bench.{self.module}"), name)


# the one list: the command line, the files in data/benchmarks and the table of the README follow it
BENCHMARKS = {
    "overhead": Benchmark("certifying over the bare forward pass", "overhead", cuda=True),
    "loop": Benchmark("the plain published loop, and ART, over the engine", "loop", cuda=True),
    "noise": Benchmark("torch.randn over our noise", "parts", cuda=True),
    "votes": Benchmark("a Python loop over our counting", "parts", cuda=True),
    "bounds": Benchmark("one call of SciPy an image over ours", "parts", cuda=True),
    "samples": Benchmark("a fixed n over sequential certification", "samples"),
    "memory": Benchmark("ART's peak memory over the engine's", "memory"),
    "scaling": Benchmark("two threads over one", "scaling"),
    "sigma": Benchmark("searching sigma over certifying with a fixed n", "sigma"),
    "balls": Benchmark("minutes for a memory of 10,000 certified balls (no ratio)", "sigma"),
    "panels": Benchmark("reading a record anew over moving a panel's slider", "panels"),
}
ON_CUDA = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.cuda)
