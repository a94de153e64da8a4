"""The command line: `smoothkit COMMAND`, also `python -m smoothkit COMMAND`. Every command is thin.

What brings torch, papermill or plotly along is imported by the command that needs it: `smoothkit --help` is quick.
"""

import argparse
import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from smoothbook.bench.registry import BENCHMARKS
from smoothkit.certify.bounds import check_reach, radius_cap
from smoothkit.certify.sequential import check_rule, sequential_rule
from smoothkit.reading import audit, format_table, report
from smoothkit.records import merge, open_record, pack
from smoothkit.types import StoppingRule, check_sigma

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Bad input is one line on standard error."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"smoothkit: warning: {message}", file=sys.stderr)
        return _run_command(options)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill: ended like Ctrl-C, what is finished is written."""


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated in the main thread."""

    def stop(*_):
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _run_command(options: argparse.Namespace) -> int:
    kept = "what was finished is kept, the same command goes on from there"
    try:
        return options.function(options) or 0
    except Terminated:
        print(f"smoothkit: terminated; {kept}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"\nsmoothkit: interrupted; {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"smoothkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# --- how commands are declared -----------------------------------------------------------------------

_COMMANDS: dict[str, tuple[Callable, str, tuple]] = {}


def _command(text: str, *options: Callable) -> Callable:
    """Make a function a command: its name without the underscore, one sentence on it, its options."""

    def declare(function: Callable) -> Callable:
        _COMMANDS[function.__name__.lstrip("_")] = function, text, options
        return function

    return declare


def _option(*names: str, **settings) -> Callable:
    return lambda parser: parser.add_argument(*names, **settings)


def _one_of(*options: Callable) -> Callable:
    """Options of which at most one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for option in options:
            option(group)

    return add


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds what an option is if not given, where it is something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="smoothkit", description="Randomized smoothing: certify, report, run the workbook."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, text, options) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
        command.set_defaults(function=function)
        for option in options:
            option(command)
    return parser


_FORMAT = _option("--format", choices=("table", "csv", "markdown", "latex"), default="table")
_N0 = _option("--n0", type=int, default=100, help="samples to select the class")
_ALPHA = _option("--alpha", type=float, default=0.001, help="failure probability of each certificate")


# --- run ---------------------------------------------------------------------------------------------


@_command(
    "execute notebooks with papermill and build the gallery of their figures",
    _option(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="names as 00_start_here; all of the preset if none is given"
    ),
    _option("--preset", default="digits", help="parameter set in notebooks/presets"),
    _option("--out", metavar="DIR", help="where results go; runs/PRESET if not given"),
    _option("--jobs", type=int, default=1, metavar="J", help="notebooks at a time"),
)
def _run(options: argparse.Namespace) -> int:
    from smoothbook.runner.run import run_notebooks

    summary = run_notebooks(options.notebooks or None, preset=options.preset, out=options.out, jobs=options.jobs)
    failed = [result.name for result in summary.failed]
    if failed:
        print(f"smoothkit: not finished: {', '.join(failed)}; the gallery says why", file=sys.stderr)
    here = Path.cwd()
    print(f"gallery: {summary.index.relative_to(here) if summary.index.is_relative_to(here) else summary.index}")
    return summary.exit_status


# --- certify -----------------------------------------------------------------------------------------


@_command(
    "sample votes into a record and say what they certify; goes on where it stopped",
    _option(
        "--model", required=True, metavar="M", help="starter:NAME, local-dir:FOLDER, hf-hub:ORG/MODEL or a timm name"
    ),
    _option("--data", required=True, metavar="D", help="digits, cifar10, imagenet, folder:PATH or parquet:PATH"),
    _option("--sigma", required=True, type=float, metavar="S", help="noise level, pixel units on [0, 1]"),
    _option("--n", required=True, type=int, metavar="N", help="samples to estimate p_A"),
    _option("--out", required=True, metavar="RECORD", help="folder of the record"),
    _N0,
    _ALPHA,
    _one_of(
        _option(
            "--radii",
            nargs="+",
            type=float,
            metavar="R",
            help="sample only until these L2 radii are decided, n at most",
        ),
        _option(
            "--within",
            type=float,
            metavar="W",
            help="sample only until more samples would lengthen the radius by no more than this, n at most",
        ),
    ),
    _option(
        "--rule",
        choices=("hybrid", "kt", "staged"),
        default="hybrid",
        help="how --radii are decided; see 10_certification",
    ),
    _option("--seed", type=int, default=0, help="seed of the noise"),
    _option("--split", default="test", help="test, train, or validation where there is one"),
    _option("--subset", default="all", help="all, first:100, every:20, range:500:1000 or classes:6-9"),
    _option("--size", type=int, help="resize and crop pictures to this size (folders, parquet, ImageNet)"),
    _option(
        "--noise",
        metavar="FORM",
        help="grid: rounded to the data's grid before it is added; exact-grid: drawn on it by exact thresholds; float; or a "
        "grid of your own, as grid:255; if not given, grid where the data has one, else float",
    ),
    _option("--batch", type=int, help="compute batch; found by itself if not given"),
    _option(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        default="float32",
        help="precision of the network; another precision is another base classifier",
    ),
    _option(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the network; if not given, where the run is long enough to repay it",
    ),
    _option("--device", help="cpu, cuda, cuda:1; a GPU if there is one if not given"),
    _one_of(
        _option("--scheduler", metavar="ADDRESS", help="do the work on a Dask cluster, as tcp://host:8786"),
        _option("--devices", choices=("all",), help="use every GPU of this machine, a process for each"),
    ),
)
def _certify(options: argparse.Namespace) -> None:
    stop_on_sigterm()
    check_sigma(options.sigma)
    rule = _rule(options)
    import torch

    from smoothkit import Smoothed, data, models

    images = data.load(options.data, split=options.split, subset=options.subset, size=options.size)
    smoothed = Smoothed(
        models.load(options.model),
        options.sigma,
        batch=options.batch,
        precision=options.precision,
        compile=options.compile,
        device=options.device or ("cuda" if torch.cuda.is_available() else None),
    )
    with _executor(options) as executor:
        smoothed.sample(images, rule=rule, noise=options.noise, seed=options.seed, out=options.out, executor=executor)
    # the rule `radius` spends half of alpha on the last look, where its cap lies
    cap = radius_cap(options.n, options.alpha if options.within is None else options.alpha / 2, options.sigma)
    _print_report(report([options.out], sorted(options.radii or [r for r in RADII if r <= cap])), "table")


def _rule(options: argparse.Namespace) -> StoppingRule:
    """When to stop; refuses radii, or a `within`, out of reach before anything is loaded."""
    if not options.radii and options.within is None:
        check_reach(options.n, options.alpha)
        return StoppingRule(n0=options.n0, n=options.n, alpha=options.alpha)
    aim = {"radii": options.radii, "kind": options.rule} if options.radii else {"within": options.within}
    rule = sequential_rule(**aim, n0=options.n0, n_max=options.n, alpha=options.alpha)
    check_rule(rule, options.sigma)
    return rule


@contextlib.contextmanager
def _executor(options: argparse.Namespace):
    """Where the work is done: None for this process."""
    if options.scheduler:
        try:
            from distributed import Client
        except ImportError:
            raise ValueError("--scheduler needs Dask: pip install 'smoothkit[distributed]'") from None
        with Client(options.scheduler, timeout="30s") as client:
            yield client.get_executor()
    elif options.devices:
        import torch

        from smoothkit.sampling.workers import gpu_pool

        with gpu_pool(torch.cuda.device_count()) as pool:
            yield pool
    else:
        yield None


# --- report and claims -------------------------------------------------------------------------------


@_command(
    "certified accuracy of records and published logs, one row a path",
    _option("paths", nargs="+", metavar="PATH", help="a record folder or a published log"),
    _option("--radii", nargs="+", type=float, default=list(RADII), metavar="R", help="L2 radii"),
    _option("--alpha", type=float, help="recompute records at this failure probability"),
    _FORMAT,
    _option("--figures", metavar="DIR", help="also draw them: DIR/index.html, with SVG, PDF, PNG and CSV"),
)
def _report(options: argparse.Namespace) -> None:
    _print_report(report(options.paths, options.radii, alpha=options.alpha), options.format)
    if options.figures:
        from smoothbook.runner.gallery import report_figures

        print(f"figures: {report_figures(options.paths, options.figures, alpha=options.alpha)}", file=sys.stderr)


def _print_report(frame, form: str) -> None:
    for line in frame.attrs["warnings"]:
        print(f"smoothkit: warning: {line}", file=sys.stderr)
    print(format_table(frame, form), end="")


@_command("the claims of the papers, each measured from committed records", _FORMAT)
def _claims(options: argparse.Namespace) -> None:
    from smoothbook.tables import claims

    print(format_table(claims(), options.format), end="")


# --- audit -------------------------------------------------------------------------------------------


@_command(
    "check a record: files, settings, digests, radii, and votes drawn again; exit status 0 if all passed, 1 if "
    "something failed, 3 if something could not be checked",
    _option("record", metavar="RECORD", help="folder of the record"),
    _option("--redraw", type=int, default=20, metavar="K", help="images whose votes are drawn again"),
    _option("--seed", type=int, help="seed of the choice of these images; a fresh one if not given"),
    _option("--data", metavar="D", help="the images, if the record's name does not lead there"),
    _option("--size", type=int, help="resize and crop pictures to this size, as in certify"),
    _option("--model", metavar="M", help="the classifier, if its name does not lead there"),
    _option("--device", help="where votes are drawn again"),
    _option("--compile", action="store_true", help="compile the network where the record's was"),
    _FORMAT,
)
def _audit(options: argparse.Namespace) -> int:
    found = audit(
        options.record,
        redraw=options.redraw,
        seed=options.seed,
        images=_named_images(options),
        base_classifier=_named_model(options),
        device=options.device,
        compile=options.compile,
    )
    print(format_table(found.table(), options.format), end="")
    print(f"{found.path}: {found.verdict}")
    return found.exit_status


def _named_images(options: argparse.Namespace):
    if options.data is None:
        return None
    from smoothkit import data

    known = open_record(options.record).identity
    return data.load(options.data, split=known.split, subset=known.subset, size=options.size)


def _named_model(options: argparse.Namespace):
    from smoothkit import models

    if options.model is not None:
        return models.load(options.model)
    from smoothbook.tables import RowError, classifier_of

    try:
        return classifier_of(options.record)
    except RowError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


# --- merge, pack and plan ----------------------------------------------------------------------------


@_command(
    "join the records of several machines, block by block",
    _option("records", nargs="+", metavar="RECORD", help="shards: they differ in their subset at most"),
    _option("--out", required=True, metavar="RECORD", help="a new or empty folder"),
    _option("--subset", help="what the images are together, where ranges do not say it"),
)
def _merge(options: argparse.Namespace) -> None:
    merged = merge(options.records, options.out, subset=options.subset)
    print(f"{merged.path}: {merged.rows()['image_id'].nunique():,} images of {merged.identity.subset}")


@_command(
    "write a record as one zip file to share, without paths",
    _option("record", metavar="RECORD"),
    _option("--out", required=True, metavar="FILE", help="the zip file"),
)
def _pack(options: argparse.Namespace) -> None:
    packed = pack(options.record, options.out)
    print(f"{packed}: {packed.stat().st_size:,} bytes")


@_command(
    "what certifying a data set would take: calls, hours, bytes moved, size of the record",
    _option("--data", required=True, metavar="D", help="a data set; imagenet and cifar10 need not be at hand"),
    _option("--model", required=True, metavar="M", help="a model, or a network of the benchmarks"),
    _option("--n", type=int, default=100_000, help="samples to estimate p_A"),
    _N0,
    _ALPHA,
    _option("--gpus", type=int, default=1, metavar="G", help="GPUs, or cores, that share the work"),
    _option("--rate", type=float, help="noisy copies that one of them asks about in a second, if you know it"),
    _option("--images", type=int, help="how many images; all of them if not given"),
    _option("--price", type=float, help="price of one of them for an hour, to have a cost"),
    _FORMAT,
)
def _plan(options: argparse.Namespace) -> None:
    from smoothbook.bench.plan import plan

    found = plan(
        options.data, options.model, n=options.n, n0=options.n0, alpha=options.alpha, gpus=options.gpus,
        rate=options.rate, images=options.images, price=options.price,
    )  # fmt: skip
    print(format_table(found.table(), options.format), end="")
    for note in found.notes:
        print(f"note: {note}")


# --- bench -------------------------------------------------------------------------------------------


_MEANINGS = "; ".join(f"{name}: {benchmark.says}" for name, benchmark in BENCHMARKS.items())


@_command(
    "measure ratios side by side and save them with machine and versions",
    _option(
        "name",
        choices=(*BENCHMARKS, "gpu"),
        metavar="NAME",
        help=f"{_MEANINGS}; gpu: those of them that a GPU has a part in, on one, within ten minutes",
    ),
    _option("--quick", action="store_true", help="measure only a part, within a minute"),
    _option("--device", choices=("cpu", "cuda"), default="cpu", help="where the network runs"),
    _option("--out", type=Path, metavar="DIR", help="folder of the JSON; data/benchmarks if not given"),
)
def _bench(options: argparse.Namespace) -> None:
    from smoothbook.bench.run import run, run_gpu

    if options.name == "gpu":
        found = run_gpu(quick=options.quick, out=options.out)
    else:
        found = [(options.name, *run(options.name, quick=options.quick, device=options.device, out=options.out))]
    for name, result, path in found:
        print(result.table.round(4).to_string(index=False, na_rep="-"))
        for line in result.left_out:
            print(f"note: {line}")
        print(f"saved {path.name}", file=sys.stderr)
        print(f"{name}: {result.headline}")
        for other, ratio in result.others.items():
            print(f"{name} {other} ratio={ratio:.2f}")
        print(f"{name} ratio={result.ratio:.2f}", flush=True)


# --- workshop ----------------------------------------------------------------------------------------


@_command(
    "write participants' copies of the notebooks, without solutions",
    _option("notebooks", nargs="*", metavar="NOTEBOOK", help="names as 00_start_here; all if none is given"),
    _option("--out", default="workshop", metavar="DIR", help="where the copies go"),
    _option("--again", action="store_true", help="write over copies that somebody has worked in"),
)
def _workshop(options: argparse.Namespace) -> None:
    from smoothbook.runner.workshop import write_workshop

    written = write_workshop(options.out, options.notebooks or None, again=options.again)
    print(f"{len(written)} notebooks without solutions in {options.out}; open them with: jupyter lab {options.out}")
