"""The command line: thin, and one line for every kind of bad input."""

import csv
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from smoothbook.cli import main
from smoothkit.records import open_record

RECORD = str(ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25")
CERTIFY = [
    "certify",
    "--model",
    "starter:digits-vit-0.25",
    "--data",
    "digits",
    "--sigma",
    "0.25",
    "--n",
    "200",
    "--subset",
    "first:3",
]


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "smoothkit", *arguments], capture_output=True, text=True, timeout=600, **settings
    )


def test_certify_then_report(tmp_path, capsys):
    out = str(tmp_path / "record")
    assert main([*CERTIFY, "--out", out]) == 0
    printed = capsys.readouterr()
    assert out in printed.out and "ACR" in printed.out and "images/s" in printed.err
    first = open_record(out).votes()["counts_estimation"].map(tuple).tolist()
    assert main([*CERTIFY, "--out", out]) == 0  # finished: goes on to nothing
    assert main([*CERTIFY, "--out", str(tmp_path / "again")]) == 0
    assert open_record(tmp_path / "again").votes()["counts_estimation"].map(tuple).tolist() == first
    capsys.readouterr()
    assert main(["report", out, RECORD, "--radii", "0", "0.5", "--format", "csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["path", "rows", "sigma", "alpha", "0", "0.5", "ACR"] and [r[0] for r in rows[1:]] == [
        out,
        RECORD,
    ]
    assert rows[1][1] == "3" and float(rows[2][4]) > 0.9


def test_python_dash_m_and_no_make():
    done = run("report", RECORD, "--radii", "0.25")
    assert done.returncode == 0 and "0.25" in done.stdout.splitlines()[0] and done.stderr == ""


@pytest.mark.parametrize("form", ["table", "csv", "markdown", "latex"])
def test_report_formats(form, capsys):
    assert main(["report", RECORD, "--format", form, "--alpha", "0.05"]) == 0
    out = capsys.readouterr().out
    assert {"table": "path", "csv": "path,rows", "markdown": "| path", "latex": r"\begin{tabular}"}[form] in out
    assert "0.05" in out


def test_warnings_about_logs_go_to_standard_error(tmp_path):
    log = tmp_path / "sigma_0.25"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.978\t0\t15.4\n20\t7\t-1\t0.0\t0\t15.6\n")
    done = run("report", str(log))
    assert done.returncode == 0 and "0.500" in done.stdout
    assert "smoothkit: warning:" in done.stderr and "line 2" in done.stderr


@pytest.mark.slow
def test_claims(capsys):
    assert main(["claims", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["system", "claim", "experiment", "data", "margin", "measured", "interval", "holds"]
    assert {r["holds"] for r in rows} <= {"yes", "no", "unclear", "not measured"} and len(rows) >= 9
    trained = next(r for r in rows if r["claim"].startswith("trained with noise"))
    assert trained["holds"] == "yes" and "360 images" in trained["data"]


@pytest.mark.slow
def test_claims_from_published_logs(public_data, capsys):
    assert main(["claims", "--format", "csv"]) == 0
    rows = [r for r in csv.DictReader(io.StringIO(capsys.readouterr().out)) if "published log" in r["experiment"]]
    assert len(rows) == 5 and all(r["holds"] == "yes" for r in rows)
    assert next(r for r in rows if "0.49" in r["claim"])["data"] == "imagenet, 427 images"


def with_(**changes):
    """The certify command with options replaced."""
    options = {
        "--model": "starter:digits-vit-0.25",
        "--data": "digits",
        "--sigma": "0.25",
        "--n": "200",
        "--subset": "first:1",
    }
    options |= {f"--{k}": v for k, v in changes.items()}
    return ["certify", *(x for pair in options.items() for x in pair)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (with_(data="digit"), "did you mean 'digits'?"),
        (with_(model="resnt18"), "did you mean 'resnet18"),
        (with_(model="weights.pth"), "looks like a pickle"),
        (with_(sigma="0"), "sigma must be a finite number above 0"),
        (with_(sigma="-1"), "sigma must be a finite number above 0"),
        (with_(sigma="64"), "did you mean 0.251?"),
        (with_(alpha="95"), "did you mean 0.05?"),
        (with_(alpha="0"), "alpha must lie in (0, 1)"),
        (with_(n0="0"), "n0 must be a whole number of at least 1"),
        (with_(n="9"), "use n of at least 10"),
        (with_(subset="each:3"), "every:20"),
        (with_(split="dev"), "choose one of test, validation, train"),
        (with_(batch="0"), "batch must be a whole number of at least 1"),
        (with_(seed="-3"), "seed must lie in [0, 2**64)"),
        (with_(size="32"), "models resize inside"),
        (["report", "/nowhere"], "/nowhere"),
        (["run", "--preset", "digit"], "did you mean"),
        (["run", "00_start_her"], "did you mean"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    if arguments[0] == "certify":
        arguments = [*arguments, "--out", str(tmp_path / "r")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("smoothkit: ") and message in lines[0], printed.err
    assert not (tmp_path / "r").exists()


def test_the_record_of_another_run(tmp_path, capsys):
    out = str(tmp_path / "r")
    assert main([*with_(), "--out", out]) == 0
    before = open_record(out).rows()
    assert main([*with_(sigma="0.5"), "--out", out]) == 2
    assert "is the record of another run: this one has sigma 0.5 instead of 0.25" in capsys.readouterr().err
    assert open_record(out).rows().equals(before)


def test_a_truncated_part_is_named_and_the_rest_kept(tmp_path, capsys):
    out = tmp_path / "r"
    assert main([*with_(), "--out", str(out)]) == 0
    (part,) = out.glob("parts/*.parquet")
    counts = open_record(out).votes()["counts_estimation"][0].tolist()
    part.write_bytes(part.read_bytes()[:-100])
    for command in (["report", str(out)], [*with_(), "--out", str(out)]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert part.name in err and "move it away and run again" in err
    part.unlink()
    assert main([*with_(), "--out", str(out)]) == 0
    assert open_record(out).votes()["counts_estimation"][0].tolist() == counts


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"Dear reader,\nthis is prose.\n", b""])
def test_a_log_that_is_not_a_log(content, tmp_path, capsys):
    path = tmp_path / "log"
    path.write_bytes(content)
    assert main(["report", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("smoothkit: ")


@pytest.mark.parametrize("arguments", [[], ["certfy"], ["report"], ["certify", "--sigma", "a lot"]])
def test_usage_errors(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "usage: smoothkit" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(tmp_path):
    """An interrupt in the middle: status 130, one sentence, and what was done is kept."""
    out = tmp_path / "r"
    command = [sys.executable, "-m", "smoothkit", *with_(subset="all", n="20000"), "--no-compile", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    deadline = time.monotonic() + 600
    while not any(path.stat().st_size for path in out.glob("parts/*")):  # a block is finished
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        err = process.communicate(timeout=600)[1]
    finally:
        process.kill()  # left alone it would run for long
    assert process.returncode == 130, err
    assert "interrupted; what was finished is kept" in err and "Traceback" not in err
    assert 0 < len(open_record(out).rows()) < 4 * 360


def test_run_ends_by_naming_the_gallery(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smoothbook.runner.run._run_all", lambda plan, *_: [])
    assert main(["run", "00", "--preset", "smoke"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"gallery: {os.path.join('runs', 'smoke', 'index.html')}"
