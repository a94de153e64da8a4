"""Run the notebooks of the workbook with a preset and put what they made into one gallery that opens offline.

Each notebook is executed by papermill in a process of its own, so that one that fails, hangs or is killed takes
nobody along. The process ends itself when its input closes: however the parent dies, no kernel is left behind.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat

import smoothkit
from smoothbook.runner.notebooks import BOOK, check_parameters, chosen_notebooks, load_preset, notebooks_dir
from smoothkit.records import read_json, write_atomically

_PACKAGES = tuple(dict.fromkeys([str(Path(smoothkit.__file__).resolve().parents[1]), str(BOOK)]))
_GRACE = 20.0  # seconds a notebook gets to save itself and end its kernel


@dataclasses.dataclass(frozen=True)
class Result:
    """How one notebook ended: `status` is ok, failed, interrupted or "not run"."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did; `exit_status` is what a command should end with."""

    preset: str
    out: Path
    results: tuple[Result, ...]

    @property
    def index(self) -> Path:
        return self.out / "index.html"

    @property
    def ok(self) -> bool:
        return all(result.status == "ok" for result in self.results)

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status != "ok")

    @property
    def exit_status(self) -> int:
        interrupted = any(result.status in ("interrupted", "not run") for result in self.results)
        return 130 if interrupted else int(not self.ok)


# --- running -----------------------------------------------------------------------------------------


def run_notebooks(
    names: Iterable[str] | str | None = None,
    *,
    preset: str = "digits",
    out: str | Path | None = None,
    jobs: int = 1,
    timeout: float | None = None,
    log: Callable[[str], None] = print,
    source: Path | None = None,
) -> Summary:
    """Execute notebooks with the parameters of a preset, keep the executed copies and build the gallery.

    Parameters
    ----------
    names : iterable of str, optional
        Which notebooks; all if not given. The results of the others stay in the gallery.
    preset : str
        A file in `notebooks/presets`.
    out : path, optional
        Where everything goes; `runs/<preset>` in the current folder if not given.
    jobs : int
        Notebooks at the same time.
    timeout : float, optional
        Seconds that one notebook may take.
    log : callable
        Gets one line when a notebook starts and one when it ends.
    source : path, optional
        The folder with the notebooks and `presets/`.

    Raises
    ------
    ValueError
        If a preset, notebook or parameter is unknown. A notebook that fails does not raise: see Summary.
    """
    from smoothbook.runner import gallery  # slow to import, and the process of a notebook does not need it

    source = (source or notebooks_dir()).resolve()
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    parameters = load_preset(preset, source)
    out = Path(out or Path("runs") / preset).resolve()
    plan = [_plan(name, parameters.get(name, {}), source, out, jobs) for name in chosen_notebooks(names, source)]
    for folder in ("notebooks", "figures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    results = _run_all(plan, preset, out, jobs, timeout, log)
    gallery.build_gallery(out)
    return Summary(preset, out, tuple(results))


def _plan(name: str, parameters: dict, source: Path, out: Path, jobs: int) -> dict:
    """All that the process of one notebook needs to know, checked before anything runs."""
    known = check_parameters(source / f"{name}.ipynb", parameters)
    if "figures_dir" in known and "figures_dir" not in parameters:
        parameters = {**parameters, "figures_dir": str(out / "figures")}
    return {
        "name": name,
        "input": str(source / f"{name}.ipynb"),
        "output": str(out / "notebooks" / f"{name}.ipynb"),
        "cwd": str(source),
        "parameters": parameters,
        "env": _environment(name, out, jobs),
        "out": str(out),
    }


def _environment(name: str, out: Path, jobs: int) -> dict[str, str]:
    """The kernel must be this Python's, and nothing may be written to the home folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("JUPYTER_PATH", "JUPYTER_PREFER_ENV_PATH")}
    env["IPYTHONDIR"] = str(out / ".ipython")
    for folder in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        env[f"JUPYTER_{folder}"] = str(out / ".jupyter" / folder.split("_")[0].lower())
    env["PLOTLY_RENDERER"] = "plotly_mimetype"  # the default adds 5 MB of JavaScript to each figure
    env["SMOOTHKIT_NOTEBOOK"] = name  # figures.show writes it beside the figure
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*_PACKAGES, env.get("PYTHONPATH", "")]))
    if env.get("SMOOTHKIT_DATA"):  # a relative path means the folder we were started in, not that of the notebooks
        env["SMOOTHKIT_DATA"] = str(Path(env["SMOOTHKIT_DATA"]).expanduser().resolve())
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return env


def _run_all(plan: list[dict], preset: str, out: Path, jobs: int, timeout: float | None, log: Callable) -> list[Result]:
    waiting, running, done = list(plan), [], []

    def finish(worker: "_Worker") -> None:
        running.remove(worker)
        done.append(worker.result())
        log(_line(done[-1]))
        _remember(out, preset, done[-1])

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Worker(waiting.pop(0), timeout))
                log(f"{running[-1].name}  started")
            for worker in [worker for worker in running if worker.ended()]:
                finish(worker)
            time.sleep(0.05)
    except KeyboardInterrupt:
        log("interrupted: saving what is done")
        for worker in running:
            worker.ask_to_stop("interrupted")
        for worker in list(running):
            worker.wait_or_kill()
            finish(worker)
        done += [Result(job["name"], "not run") for job in waiting]
    finally:
        for worker in running:
            worker.wait_or_kill()
    order = [job["name"] for job in plan]
    return sorted(done, key=lambda result: order.index(result.name))


def _line(result: Result) -> str:
    error = f"  {result.error}" if result.error else ""
    return f"{result.name}  {result.status}  {result.seconds:.0f} s{error}"


def _remember(out: Path, preset: str, result: Result) -> None:
    """Add one result to run.json, at once, so that a run that is killed still has its gallery."""
    path = out / "run.json"
    run = read_json(path, ValueError, "delete it", notebooks=dict) if path.exists() else {"notebooks": {}}
    entry = dataclasses.asdict(result)
    entry |= {"preset": preset, "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes")}
    run["notebooks"][entry.pop("name")] = entry
    run["preset"] = preset
    write_atomically(path, lambda file: file.write(json.dumps(run, indent=1).encode()))


# jsonschema, for nbformat, reads the grammar of IRIs where it is installed: a second for what no notebook holds
_START = (
    "import sys; sys.modules['rfc3987_syntax'] = None; from smoothbook.runner.run import _execute_job; _execute_job()"
)


class _Worker:
    """One notebook in its own process group, out of reach of the terminal's Ctrl-C: only the parent stops it."""

    def __init__(self, job: dict, timeout: float | None) -> None:
        self.name, self.job, self.timeout = job["name"], job, timeout
        self.started, self.why_stopped, self.deadline = time.monotonic(), "", None
        self.answer = Path(job["out"]) / f".{self.name}.result.json"
        self.answer.unlink(missing_ok=True)
        self._forget_old_figures()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START],
            env=job["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.complaints: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        job = {key: value for key, value in job.items() if key != "env"}
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**job, "answer": str(self.answer)}) + "\n")
            self.process.stdin.flush()

    def _forget_old_figures(self) -> None:
        for about in (Path(self.job["out"]) / "figures").glob("*.json"):
            if read_json(about, ValueError, "delete it", notebook=str | None)["notebook"] == self.name:
                for path in about.parent.glob(f"{about.stem}.*"):
                    path.unlink()

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.complaints = [*self.complaints[-20:], line.rstrip()]

    def ended(self) -> bool:
        now = time.monotonic()
        if self.timeout is not None and not self.why_stopped and now - self.started > self.timeout:
            self.ask_to_stop(f"stopped after {self.timeout:g} s, its timeout")
        if self.deadline is not None and now > self.deadline:
            self.process.kill()
        return self.process.poll() is not None

    def ask_to_stop(self, why: str) -> None:
        if self.why_stopped:
            return
        self.why_stopped, self.deadline = why, time.monotonic() + _GRACE
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def wait_or_kill(self) -> None:
        self.ask_to_stop("interrupted")
        try:
            self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()

    def result(self) -> Result:
        seconds = round(time.monotonic() - self.started, 1)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        error = read_json(self.answer, error=str)["error"] if self.answer.exists() else None
        self.answer.unlink(missing_ok=True)
        if self.why_stopped and error != "":
            status = "interrupted" if self.why_stopped == "interrupted" else "failed"
            return Result(self.name, status, seconds, self.why_stopped)
        if error is None:
            last = next((line for line in reversed(self.complaints) if line.strip()), "")
            error = f"the process ended with status {self.process.returncode}: {last}".rstrip(": ")
        return Result(self.name, "failed" if error else "ok", seconds, error)


# --- inside the process of one notebook --------------------------------------------------------------


def _execute_job() -> None:
    """Read a job from standard input, execute it, leave the error (or "") in a file."""
    job = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
    threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    error, paths = "interrupted", _machine_paths(job)
    try:
        error = _execute(job)
    except KeyboardInterrupt:
        pass
    finally:
        _tidy(Path(job["output"]), paths)
        answer = json.dumps({"error": without_paths(error, paths)}).encode()
        write_atomically(Path(job["answer"]), lambda file: file.write(answer))


def _stop_when_input_closes() -> None:
    sys.stdin.read()
    if hasattr(signal, "pthread_kill"):  # it wakes the main thread from waiting for the kernel
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _execute(job: dict) -> str:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            job["input"],
            job["output"],
            job["parameters"],
            kernel_name="python3",
            cwd=job["cwd"],
            progress_bar=False,
            log_output=False,
        )
    except PapermillExecutionError as failure:
        return f"{failure.ename}: {last_line(failure.evalue)} (cell {failure.exec_count})"
    except Exception as failure:
        return f"{type(failure).__name__}: {last_line(str(failure))}"
    return ""


def last_line(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _tidy(path: Path, paths: dict[str, str]) -> None:
    """Drop from a kept notebook what is large (widget state) and what names this machine."""
    if not path.exists():
        return
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for key in ("input_path", "output_path", "parameters", "environment_variables"):
        notebook.metadata.get("papermill", {}).pop(key, None)
    for cell in notebook.cells:
        cell.source = without_paths(cell.source, paths)
        for output in cell.get("outputs", []):
            _clean_output(output, paths)
    nbformat.write(notebook, path)


def _clean_output(output: nbformat.NotebookNode, paths: dict[str, str]) -> None:
    for key in ("text", "evalue"):
        if key in output:
            output[key] = without_paths(output[key], paths)
    if "traceback" in output:
        output.traceback = [without_paths(line, paths) for line in output.traceback]
    for mime in [mime for mime in output.get("data", {}) if mime.startswith("text/")]:
        output.data[mime] = without_paths(output.data[mime], paths)


def _machine_paths(job: dict) -> dict[str, str]:
    """Folders of this machine and what to show instead; `..` is right for a notebook in OUT/notebooks."""
    paths = {
        job["out"]: "..",
        job["cwd"]: "[notebooks]",
        sys.prefix: "[environment]",
        **dict.fromkeys(reversed(_PACKAGES), "[workbook]"),
        sys.base_prefix: "[python]",
        tempfile.gettempdir(): "[temporary]",
        str(Path.home()): "~",
    }
    return {path: shown for path, shown in paths.items() if len(path.strip("/")) > 2 and path != "/usr"}


def without_paths(text: str, paths: dict[str, str]) -> str:
    """The text with the longest match among `paths` replaced; a path inside a longer word stays."""
    for path in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<![\w+/=.-]){re.escape(path)}(?![\w-])", lambda _, shown=paths[path]: shown, text)
    return text
