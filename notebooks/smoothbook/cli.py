"""The command line: `smoothkit COMMAND`, also `python -m smoothkit COMMAND`. Every command is thin."""

import argparse
import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from smoothkit.types import StoppingRule, check_sigma

FORMATS = ("table", "csv", "markdown", "latex")
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
    def stop(*_):
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _run_command(options: argparse.Namespace) -> int:
    try:
        return options.command(options)
    except Terminated:
        print("smoothkit: terminated; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 143
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
    _add_audit(commands)
    _add_merge(commands)
    _add_pack(commands)
    _add_plan(commands)
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
    from smoothbook.runner.run import run_notebooks

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
        default=None,
        metavar="FORM",
        help="grid: rounded to the data's grid before it is added; exact-grid: drawn on it by exact thresholds; float; or a "
        "grid of your own, as grid:255; if not given, grid where the data has one, else float",
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
    elsewhere = parser.add_mutually_exclusive_group()
    elsewhere.add_argument(
        "--scheduler", default=None, metavar="ADDRESS", help="do the work on a Dask cluster, as tcp://host:8786"
    )
    elsewhere.add_argument(
        "--devices", choices=("all",), default=None, help="use every GPU of this machine, a process for each"
    )


def _certify(options: argparse.Namespace) -> int:
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
    _print_certified(options)
    return 0


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


def _print_certified(options: argparse.Namespace) -> None:
    from smoothkit.certify.bounds import radius_cap
    from smoothkit.reading import report

    radii = options.radii
    if not radii:
        # the rule `radius` spends half of alpha on the last look, where its cap lies
        cap = radius_cap(options.n, options.alpha if options.within is None else options.alpha / 2, options.sigma)
        radii = [r for r in RADII if r <= cap]
    _print_report(report([options.out], sorted(radii)), "table")


def _rule(options: argparse.Namespace) -> StoppingRule:
    """When to stop; refuses radii, or a `within`, out of reach before anything is loaded."""
    from smoothkit.certify.bounds import check_reach
    from smoothkit.certify.sequential import check_rule, sequential_rule

    if not options.radii and options.within is None:
        check_reach(options.n, options.alpha)
        return StoppingRule(n0=options.n0, n=options.n, alpha=options.alpha)
    aim = {"radii": options.radii, "kind": options.rule} if options.radii else {"within": options.within}
    rule = sequential_rule(**aim, n0=options.n0, n_max=options.n, alpha=options.alpha)
    check_rule(rule, options.sigma)
    return rule


# --- report and claims ---------------------------------------------------------------------------------


def _add_report(commands) -> None:
    parser = _command(commands, "report", _report, "certified accuracy of records and published logs, one row a path")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a record folder or a published log")
    parser.add_argument("--radii", nargs="+", type=float, default=list(RADII), metavar="R", help="L2 radii")
    parser.add_argument("--alpha", type=float, default=None, help="recompute records at this failure probability")
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument(
        "--figures", default=None, metavar="DIR", help="also draw them: DIR/index.html, with SVG, PDF, PNG and CSV"
    )


def _report(options: argparse.Namespace) -> int:
    from smoothkit.reading import report

    _print_report(report(options.paths, options.radii, alpha=options.alpha), options.format)
    if options.figures:
        from smoothbook.runner.gallery import report_figures

        print(f"figures: {report_figures(options.paths, options.figures, alpha=options.alpha)}", file=sys.stderr)
    return 0


def _print_report(frame, form: str) -> None:
    from smoothkit.reading import format_table

    for line in frame.attrs["warnings"]:
        print(f"smoothkit: warning: {line}", file=sys.stderr)
    print(format_table(frame, form), end="")


def _add_claims(commands) -> None:
    parser = _command(commands, "claims", _claims, "the claims of the papers, each measured from committed records")
    parser.add_argument("--format", choices=FORMATS, default="table")


def _claims(options: argparse.Namespace) -> int:
    from smoothbook.tables.claims import claims
    from smoothkit.reading import format_table

    print(format_table(claims(), options.format), end="")
    return 0


# --- audit --------------------------------------------------------------------------------------------


def _add_audit(commands) -> None:
    parser = _command(
        commands,
        "audit",
        _audit,
        "check a record: files, settings, digests, radii, and votes drawn again; exit status 0 if all passed, 1 if "
        "something failed, 3 if something could not be checked",
    )
    parser.add_argument("record", metavar="RECORD", help="folder of the record")
    parser.add_argument("--redraw", type=int, default=20, metavar="K", help="images whose votes are drawn again")
    parser.add_argument("--seed", type=int, default=None, help="of their choice; a fresh one if not given")
    parser.add_argument(
        "--data", default=None, metavar="D", help="the images, if the record's name does not lead there"
    )
    parser.add_argument("--size", type=int, default=None, help="of pictures, as in certify")
    parser.add_argument("--model", default=None, metavar="M", help="the classifier, if its name does not lead there")
    parser.add_argument("--device", default=None, help="where votes are drawn again")
    parser.add_argument("--compile", action="store_true", help="compile the network where the record's was")
    parser.add_argument("--format", choices=FORMATS, default="table")


def _audit(options: argparse.Namespace) -> int:
    from smoothkit.reading import audit, format_table

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
    from smoothkit.records import open_record

    known = open_record(options.record).identity
    return data.load(options.data, split=known.split, subset=known.subset, size=options.size)


def _named_model(options: argparse.Namespace):
    from smoothkit import models

    if options.model is not None:
        return models.load(options.model)
    from smoothbook.settings import RowError
    from smoothbook.tables.make import classifier_of

    try:
        return classifier_of(options.record)
    except RowError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


# --- merge, pack and plan ------------------------------------------------------------------------------


def _add_merge(commands) -> None:
    parser = _command(commands, "merge", _merge, "join the records of several machines, block by block")
    parser.add_argument("records", nargs="+", metavar="RECORD", help="shards: they differ in their subset at most")
    parser.add_argument("--out", required=True, metavar="RECORD", help="a new or empty folder")
    parser.add_argument("--subset", default=None, help="what the images are together, where ranges do not say it")


def _merge(options: argparse.Namespace) -> int:
    from smoothkit.records import merge

    merged = merge(options.records, options.out, subset=options.subset)
    print(f"{merged.path}: {merged.rows()['image_id'].nunique():,} images of {merged.identity.subset}")
    return 0


def _add_pack(commands) -> None:
    parser = _command(commands, "pack", _pack, "write a record as one zip file to share, without paths")
    parser.add_argument("record", metavar="RECORD")
    parser.add_argument("--out", required=True, metavar="FILE", help="the zip file")


def _pack(options: argparse.Namespace) -> int:
    from smoothkit.records import pack

    packed = pack(options.record, options.out)
    print(f"{packed}: {packed.stat().st_size:,} bytes")
    return 0


def _add_plan(commands) -> None:
    parser = _command(
        commands, "plan", _plan, "what certifying a data set would take: calls, hours, bytes moved, size of the record"
    )
    parser.add_argument(
        "--data", required=True, metavar="D", help="a data set; imagenet and cifar10 need not be at hand"
    )
    parser.add_argument("--model", required=True, metavar="M", help="a model, or a network of the benchmarks")
    parser.add_argument("--n", type=int, default=100_000, help="samples to estimate p_A")
    parser.add_argument("--n0", type=int, default=100, help="samples to select the class")
    parser.add_argument("--alpha", type=float, default=0.001, help="failure probability of each certificate")
    parser.add_argument("--gpus", type=int, default=1, metavar="G", help="GPUs, or cores, that share the work")
    parser.add_argument("--rate", type=float, default=None, help="noisy copies a second of one of them, if you know it")
    parser.add_argument("--images", type=int, default=None, help="how many images; all of them if not given")
    parser.add_argument("--price", type=float, default=None, help="of one of them for an hour, to have a cost")
    parser.add_argument("--format", choices=FORMATS, default="table")


def _plan(options: argparse.Namespace) -> int:
    from smoothbook.bench.plan import plan
    from smoothkit.reading import format_table

    found = plan(
        options.data, options.model, n=options.n, n0=options.n0, alpha=options.alpha, gpus=options.gpus,
        rate=options.rate, images=options.images, price=options.price,
    )  # fmt: skip
    print(format_table(found.table(), options.format), end="")
    for note in found.notes:
        print(f"note: {note}")
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
    "sigma": "searching sigma over certifying with a fixed n",
    "balls": "minutes for a memory of 10,000 certified balls (no ratio)",
    "panels": "reading a record anew over moving a panel's slider",
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
    from smoothbook import bench

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
    from smoothbook.runner.workshop import write_workshop

    written = write_workshop(options.out, options.notebooks or None, again=options.again)
    print(f"{len(written)} notebooks without solutions in {options.out}; open them with: jupyter lab {options.out}")
    return 0
