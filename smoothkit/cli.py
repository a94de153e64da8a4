"""The command line: `smoothkit COMMAND`, also `python -m smoothkit COMMAND`. Every command is thin."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

FORMATS = ("table", "csv", "markdown", "latex")
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is one line on standard error."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"smoothkit: warning: {message}", file=sys.stderr)
        return _run_command(options)


def _run_command(options: argparse.Namespace) -> int:
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print(
            "\nsmoothkit: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"smoothkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smoothkit", description="Randomized smoothing: certify, report, run the workbook."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_certify(commands)
    _add_report(commands)
    _add_claims(commands)
    _add_bench(commands)
    _add_workshop(commands)
    return parser


def _command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(command=function)
    return parser


# --- run ---------------------------------------------------------------------------------------------


def _add_run(commands) -> None:
    parser = _command(commands, "run", _run, "execute notebooks with papermill and build the gallery of their figures")
    parser.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="names as 00_start_here; all of the preset if none is given"
    )
    parser.add_argument("--preset", default="digits", help="parameter set in notebooks/presets")
    parser.add_argument("--out", default=None, metavar="DIR", help="where results go; runs/PRESET if not given")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="notebooks at a time")


def _run(options: argparse.Namespace) -> int:
    from smoothkit.workbook import run_notebooks

    summary = run_notebooks(options.notebooks or None, preset=options.preset, out=options.out, jobs=options.jobs)
    failed = [result.name for result in summary.failed]
    if failed:
        print(f"smoothkit: not finished: {', '.join(failed)}; the gallery says why", file=sys.stderr)
    here = Path.cwd()
    print(f"gallery: {summary.index.relative_to(here) if summary.index.is_relative_to(here) else summary.index}")
    return summary.exit_status


# --- certify -----------------------------------------------------------------------------------------


def _add_certify(commands) -> None:
    parser = _command(
        commands, "certify", _certify, "sample votes into a record and say what they certify; goes on where it stopped"
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="starter:NAME, local-dir:FOLDER, hf-hub:ORG/MODEL or a timm name"
    )
    parser.add_argument(
        "--data", required=True, metavar="D", help="digits, cifar10, imagenet, folder:PATH or parquet:PATH"
    )
    parser.add_argument("--sigma", required=True, type=float, metavar="S", help="noise level, pixel units on [0, 1]")
    parser.add_argument("--n", required=True, type=int, metavar="N", help="samples to estimate p_A")
    parser.add_argument("--out", required=True, metavar="RECORD", help="folder of the record")
    parser.add_argument("--n0", type=int, default=100, help="samples to select the class")
    parser.add_argument("--alpha", type=float, default=0.001, help="failure probability of each certificate")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--radii",
        nargs="+",
        type=float,
        default=None,
        metavar="R",
        help="sample only until these L2 radii are decided, n at most",
    )
    aim.add_argument(
        "--within",
        type=float,
        default=None,
        metavar="W",
        help="sample only until more samples would lengthen the radius by no more than this, n at most",
    )
    parser.add_argument(
        "--rule",
        choices=("hybrid", "kt", "staged"),
        default="hybrid",
        help="how --radii are decided; see 10_certification",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--split", default="test", help="test, train, or validation where there is one")
    parser.add_argument("--subset", default="all", help="all, first:100, every:20, range:500:1000 or classes:6-9")
    parser.add_argument(
        "--size", type=int, default=None, help="resize and crop pictures to this size (folders, parquet, ImageNet)"
    )
    parser.add_argument(
        "--noise",
        choices=("grid", "float", "exact-grid"),
        default="grid",
        help="grid: rounded to the data's grid before it is added; exact-grid: drawn on it by exact thresholds",
    )
    parser.add_argument("--batch", type=int, default=None, help="compute batch; found by itself if not given")
    parser.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default="float32",
        help="of the network; another precision is another base classifier",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the network; if not given, where the run is long enough to repay it",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one if not given")


def _certify(options: argparse.Namespace) -> int:
    from smoothkit.types import check_alpha, check_samples, check_sigma

    check_sigma(options.sigma)
    check_alpha(options.alpha)
    check_samples("n0", options.n0)
    from smoothkit.bounds import check_reach, radius_cap

    check_reach(options.n, options.alpha)
    _check_aim(options)
    import torch

    from smoothkit import data, models
    from smoothkit.certify import Smoothed
    from smoothkit.report import report

    images = data.load(options.data, split=options.split, subset=options.subset, size=options.size)
    smoothed = Smoothed(
        models.load(options.model),
        options.sigma,
        batch=options.batch,
        precision=options.precision,
        compile=options.compile,
        device=options.device or ("cuda" if torch.cuda.is_available() else None),
    )
    common = dict(n0=options.n0, alpha=options.alpha, seed=options.seed, out=options.out)
    common["grid"] = {"grid": "data", "float": None, "exact-grid": "exact"}[options.noise]
    if options.radii:
        smoothed.sample_sequentially(images, options.radii, n_max=options.n, kind=options.rule, **common)
        _print_report(report([options.out], sorted(options.radii)), "table")
        return 0
    if options.within is not None:
        smoothed.sample_to_radius(images, options.within, n_max=options.n, **common)
    else:
        smoothed.sample(images, n=options.n, **common)
    # the rule `radius` spends half of alpha on the last look, where its cap lies
    cap = radius_cap(options.n, options.alpha if options.within is None else options.alpha / 2, options.sigma)
    _print_report(report([options.out], [r for r in RADII if r <= cap]), "table")
    return 0


def _check_aim(options: argparse.Namespace) -> None:
    """Refuse radii, or a `within`, out of reach before anything is loaded."""
    if not options.radii and options.within is None:
        return
    from smoothkit.certify.sequential import check_rule, sequential_rule

    aim = {"radii": options.radii, "kind": options.rule} if options.radii else {"within": options.within}
    check_rule(sequential_rule(**aim, n_max=options.n, alpha=options.alpha), options.sigma)


# --- report and claims ---------------------------------------------------------------------------------


def _add_report(commands) -> None:
    parser = _command(commands, "report", _report, "certified accuracy of records and published logs, one row a path")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a record folder or a published log")
    parser.add_argument("--radii", nargs="+", type=float, default=list(RADII), metavar="R", help="L2 radii")
    parser.add_argument("--alpha", type=float, default=None, help="recompute records at this failure probability")
    parser.add_argument("--format", choices=FORMATS, default="table")


def _report(options: argparse.Namespace) -> int:
    from smoothkit.report import report

    _print_report(report(options.paths, options.radii, alpha=options.alpha), options.format)
    return 0


def _print_report(frame, form: str) -> None:
    from smoothkit.report import format_table

    for line in frame.attrs["warnings"]:
        print(f"smoothkit: warning: {line}", file=sys.stderr)
    print(format_table(frame, form), end="")


def _add_claims(commands) -> None:
    parser = _command(commands, "claims", _claims, "the claims of the papers, each measured from committed records")
    parser.add_argument("--format", choices=FORMATS, default="table")


def _claims(options: argparse.Namespace) -> int:
    from smoothkit.claims import claims
    from smoothkit.report import format_table

    print(format_table(claims(), options.format), end="")
    return 0


# --- bench -------------------------------------------------------------------------------------------


# name: what its ratio says; smoothkit.bench holds the functions
BENCHMARKS = {
    "overhead": "certifying over the bare forward pass",
    "loop": "the plain published loop, and ART, over the engine",
    "noise": "torch.randn over our noise",
    "votes": "a Python loop over our counting",
    "bounds": "one call of SciPy an image over ours",
    "samples": "a fixed n over sequential certification",
    "memory": "ART's peak memory over the engine's",
    "scaling": "two threads over one",
    "gpu": "those of them that a GPU has a part in, on one, within ten minutes",
}


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", _bench, "measure ratios side by side and save them with machine and versions")
    meanings = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("name", choices=tuple(BENCHMARKS), metavar="NAME", help=meanings)
    parser.add_argument("--quick", action="store_true", help="a part of it, within a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the network runs")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder of the JSON; data/benchmarks if not given")


def _bench(options: argparse.Namespace) -> int:
    from smoothkit import bench

    out = Path(options.out) if options.out else None
    if options.name == "gpu":
        for name, result, path in bench.run_gpu(quick=options.quick, out=out):
            _print_benchmark(name, result, path)
        return 0
    result, path = bench.run(options.name, quick=options.quick, device=options.device, out=out)
    _print_benchmark(options.name, result, path)
    return 0


def _print_benchmark(name: str, result, path: Path) -> None:
    print(result.table.round(4).to_string(index=False, na_rep="-"))
    for line in result.left_out:
        print(f"note: {line}")
    print(f"saved {path.name}", file=sys.stderr)
    print(f"{name}: {result.headline}")
    for other, ratio in result.others.items():
        print(f"{name} {other} ratio={ratio:.2f}")
    print(f"{name} ratio={result.ratio:.2f}", flush=True)


# --- workshop ----------------------------------------------------------------------------------------


def _add_workshop(commands) -> None:
    parser = _command(commands, "workshop", _workshop, "write participants' copies of the notebooks, without solutions")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names as 00_start_here; all if none is given")
    parser.add_argument("--out", default="workshop", metavar="DIR", help="where the copies go")
    parser.add_argument("--again", action="store_true", help="write over copies that somebody has worked in")


def _workshop(options: argparse.Namespace) -> int:
    from smoothkit.workshop import write_workshop

    written = write_workshop(options.out, options.notebooks or None, again=options.again)
    print(f"{len(written)} notebooks without solutions in {options.out}; open them with: jupyter lab {options.out}")
    return 0
