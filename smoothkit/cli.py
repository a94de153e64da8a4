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
    parser.add_argument(
        "--radii",
        nargs="+",
        type=float,
        default=None,
        metavar="R",
        help="sample only until these L2 radii are decided, n at most",
    )
    parser.add_argument(
        "--rule",
        choices=("hybrid", "kt", "staged"),
        default="hybrid",
        help="how --radii are decided; see 10_certification",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--split", default="test", help="test, train, or validation where there is one")
    parser.add_argument("--subset", default="all", help="all, first:100, every:20 or range:500:1000")
    parser.add_argument(
        "--size", type=int, default=None, help="resize and crop pictures to this size (folders, parquet, ImageNet)"
    )
    parser.add_argument(
        "--noise", choices=("grid", "float"), default="grid", help="grid: rounded to the data's grid before it is added"
    )
    parser.add_argument(
        "--batch", type=int, default=None, help="compute batch; 100 on a CPU, 400 on a GPU if not given"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one if not given")


def _certify(options: argparse.Namespace) -> int:
    from smoothkit.types import check_alpha, check_samples, check_sigma

    check_sigma(options.sigma)
    check_alpha(options.alpha)
    check_samples("n0", options.n0)
    from smoothkit.bounds import check_reach, radius_cap

    check_reach(options.n, options.alpha)
    import torch

    from smoothkit import data, models
    from smoothkit.certify import Smoothed
    from smoothkit.report import report

    images = data.load(options.data, split=options.split, subset=options.subset, size=options.size)
    smoothed = Smoothed(
        models.load(options.model),
        options.sigma,
        batch=options.batch,
        device=options.device or ("cuda" if torch.cuda.is_available() else None),
    )
    common = dict(n0=options.n0, alpha=options.alpha, seed=options.seed, out=options.out)
    common["grid"] = "data" if options.noise == "grid" else None
    if options.radii:
        smoothed.sample_sequentially(images, options.radii, n_max=options.n, kind=options.rule, **common)
        _print_report(report([options.out], sorted(options.radii)), "table")
        return 0
    smoothed.sample(images, n=options.n, **common)
    cap = radius_cap(options.n, options.alpha, options.sigma)
    _print_report(report([options.out], [r for r in RADII if r <= cap]), "table")
    return 0


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


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", _bench, "measure ratios side by side and save them with machine and versions")
    parser.add_argument(
        "name", choices=("samples",), metavar="NAME", help="samples: a fixed n over sequential certification"
    )
    parser.add_argument("--quick", action="store_true", help="a part of it, within seconds")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder of the JSON; data/benchmarks if not given")


def _bench(options: argparse.Namespace) -> int:
    from smoothkit.bench import run

    table, ratio, path = run(options.name, quick=options.quick, out=Path(options.out) if options.out else None)
    print(table.round(4).to_string(index=False))
    print(f"saved {path.name}", file=sys.stderr)
    print(f"{options.name} ratio={ratio:.2f}")
    return 0
