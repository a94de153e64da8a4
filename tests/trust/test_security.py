"""What is shown is escaped, what listens does so on this machine with a token, and nothing is fetched unasked."""

import html.parser
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request

import nbformat
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from smoothbook.runner import gallery

EVIL = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'</script>"


class Elements(html.parser.HTMLParser):
    """The elements of a page, with their attributes; scripts that are code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))


def test_the_gallery_escapes_everything_it_shows(tmp_path):
    entry = dict(status=EVIL, seconds=1.0, preset=EVIL, error=EVIL, date=EVIL)
    layout = {"title": {"text": EVIL}}
    figures = [
        {"notebook": EVIL, "name": EVIL.replace("/", "_"), "caption": EVIL, "figure": {"data": [{"name": EVIL}], "layout": layout}},
        {"notebook": EVIL, "name": "image", "caption": EVIL, "image": EVIL},
    ]  # fmt: skip
    page = gallery._index({"preset": EVIL, "notebooks": {EVIL: entry}}, figures, tmp_path)
    elements = Elements(page).found
    assert not [a for _, a in elements if any(name.startswith("on") for name in a)]
    assert [a.get("src") for tag, a in elements if tag == "img"] == [f"figures/{EVIL}"]
    code = [a for tag, a in elements if tag == "script" and a.get("type") != "application/json"]
    assert len(code) == 2  # plotly, and the one that draws: none that came with the data
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.S)
    assert json.loads(data)["layout"] == layout


@pytest.mark.slow
def test_nothing_is_fetched_unless_a_source_is_named(tmp_path):
    """Loading what the notebooks load by default, with every way out closed."""
    closed = (
        "import socket\n"
        "def no(*a, **k): raise AssertionError('something was fetched')\n"
        "socket.socket.connect = socket.socket.connect_ex = no; socket.getaddrinfo = no\n"
        "from smoothkit import Smoothed, data, models\n"
        "Smoothed(models.load('starter:digits-vit-0.25'), 0.25).certify(data.load('digits', subset='first:1'), n=100)\n"
    )
    done = subprocess.run([sys.executable, "-c", closed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    fetching = re.compile(r"hf-hub:|https?://|urlopen|requests\.|download_|%pip|!pip|!curl|!wget|snapshot_download")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                code = re.sub(r"  # .*$", "", cell.source, flags=re.MULTILINE)  # a parameter's comment may name a hub
                assert not fetching.search(code), f"{path.name} fetches: {fetching.search(code).group()}"


def test_make_lab_is_for_this_machine():
    (recipe,) = re.findall(r"^lab:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert "--ip=127.0.0.1" in recipe and "token=''" not in recipe and "password" not in recipe


@pytest.mark.skipif(
    not os.environ.get("SMOOTHKIT_LONG_TESTS"), reason="starts JupyterLab: SMOOTHKIT_LONG_TESTS is not set"
)
def test_jupyter_lab_asks_for_its_token(tmp_path):
    (recipe,) = re.findall(r"^lab:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    arguments = recipe.split("#")[0].split()[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    env = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyter", *arguments, "--no-browser", f"--port={port}", "--allow-root"],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}/api/contents"
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(address, timeout=60)
                raise AssertionError("answered without a token")
            except urllib.error.HTTPError as error:
                assert error.code == 403
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline and lab.poll() is None
                time.sleep(0.5)
        with urllib.request.urlopen(f"{address}?token={token}", timeout=60) as answer:
            assert answer.status == 200
    finally:
        lab.terminate()
        lab.wait(30)


def test_the_lock_file_fits_the_project():
    """Every requirement has one version in it, allowed and not older than what is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(
        re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", (ROOT / "requirements.lock").read_text(), flags=re.M)
    )
    wanted = [
        *project["dependencies"],
        *(x for e in ("test", "distributed", "fast") for x in project["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, wanted):
        assert locked[requirement.name] in requirement.specifier, requirement


def test_dependencies_without_known_holes():
    if shutil.which("pip-audit") is None:
        pytest.skip("pip-audit is not installed; pip install pip-audit, and this test asks its database")
    done = subprocess.run(["pip-audit", "--local", "--progress-spinner", "off"], capture_output=True, text=True)
    if done.returncode and "No known vulnerabilities" not in done.stderr and not done.stdout.startswith("Name"):
        pytest.skip(f"the database of pip-audit cannot be reached: {done.stderr.strip().splitlines()[-1][:120]}")
    assert done.returncode == 0, done.stdout
