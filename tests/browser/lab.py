"""A JupyterLab of its own and a page in it, for tests: nothing is read from the user's settings, nothing leaves the machine."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "runs" / "browser"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-quic",
    "--disable-component-update", "--disable-sync", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Light"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def chromium() -> str | None:
    """The path of a Chromium, from BROWSER_PATH or where systems put it."""
    named = os.environ.get("BROWSER_PATH")
    found = [named] if named else [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome", "chrome")]
    return next((path for path in found if path and Path(path).exists()), None)


@contextlib.contextmanager
def jupyter_lab(folder: Path, *, theme: str = "JupyterLab Light") -> Iterator[str]:
    """JupyterLab on copies of the notebooks in `folder`; yields its address with the token taken out of `{}`."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    overrides = folder / "settings"
    overrides.mkdir()
    settings = {**SETTINGS, "@jupyterlab/apputils-extension:themes": {"theme": theme}}
    (overrides / "overrides.json").write_text(json.dumps(settings))
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JUPYTER_PATH", "JUPYTER_PREFER_ENV_PATH", "SMOOTHKIT_NOTEBOOK")
    }
    for name in ("CONFIG", "DATA", "RUNTIME"):
        env[f"JUPYTER_{name}_DIR"] = str(folder / name.lower())
    env |= {
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    env["JUPYTERLAB_SETTINGS_DIR"] = str(folder / "user-settings")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'notebooks'}",
        f"--LabApp.app_settings_dir={overrides}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for_server(f"http://127.0.0.1:{port}/api?token={token}", process, folder / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_server(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"jupyter lab ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.3)
    raise TimeoutError(f"jupyter lab does not answer: {log.read_text()[-2000:]}")


class NotebookPage:
    """One notebook open in a page, with what the page complained of and where it wanted to go.

    The sync API of Playwright handles events only inside its own calls, so waiting is done with `wait_for_timeout`.
    """

    def __init__(self, context, address: str) -> None:
        self.page, self.address = context.new_page(), address
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.reloads_missed = 0
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", self._asked)
        self.page.set_default_timeout(60_000)

    def _asked(self, request) -> None:
        url = request.url
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")):
            self.outside.append(url)

    def open(self, name: str) -> None:
        self.name = name
        self.page.goto(self.address.format(name))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.wait_until(self._kernel_ready, 120, "the kernel to be idle and connected")

    def reload(self) -> None:
        """Save and load the page again: the kernel goes on."""
        self.page.get_by_role("menuitem", name="File", exact=True).click()
        self.page.get_by_text("Save Notebook", exact=True).click()
        self.page.wait_for_timeout(1500)
        for _ in range(4):  # the page gives the kernel four seconds to send its widgets: a busy machine may miss that
            self.page.reload()
            self.page.wait_for_selector(".jp-Notebook .jp-Cell")
            self.wait_until(self._kernel_ready, 120, "the kernel to be connected again")
            self.page.wait_for_timeout(4000)
            self._scroll_to_widgets()
            if self.page.get_by_text("Error displaying widget").count() == 0:
                return
            self.reloads_missed += 1
            self.errors = [error for error in self.errors if "widget model not found" not in error]

    def _scroll_to_widgets(self) -> None:
        found = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.widget-view+json"]')
        if found.count():
            found.first.scroll_into_view_if_needed()
            self.page.wait_for_timeout(1500)

    def _kernel_ready(self) -> bool:
        """The toolbar says `idle` before there is a session; the server knows better."""
        found = self.page.evaluate("() => fetch('/api/sessions').then(r => r.json())")
        kernels = [s["kernel"] for s in found if s.get("kernel") and s["path"] == self.name]
        ready = any(k["execution_state"] == "idle" and k["connections"] > 0 for k in kernels)
        return ready and "Idle" in self.page.locator("#jp-main-statusbar").inner_text()

    def wait_until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                self.shot("timeout")
                raise TimeoutError(f"waited {seconds:g} s for {what}; {self.cell_errors() or self.errors[-3:]}")
            self.page.wait_for_timeout(100)

    def run_all(self, seconds: float = 300) -> None:
        """Run > Run All Cells, until the last cell has its number and the kernel is idle; a cell's error ends it."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        self.page.wait_for_timeout(1000)
        self.wait_until(lambda: self._stop_on_error() and self._ran(), seconds, "all cells")
        if self.page.locator(".jp-Notebook .jp-InputPrompt", has_text="[ ]:").count():
            raise AssertionError(f"cells were not run: one above them, out of view, failed; see {self.shot('failed')}")

    def _stop_on_error(self) -> bool:
        found = self.cell_errors()
        if found:
            raise AssertionError(f"a cell failed: {found}")
        return True

    def _ran(self) -> bool:
        return self._kernel_ready() and self.page.locator(".jp-Notebook .jp-InputPrompt", has_text="[*]").count() == 0

    def cell_errors(self) -> str:
        kinds = ("stderr", "error")
        found = self.page.locator(", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in kinds))
        texts = [found.nth(i).inner_text() for i in range(found.count())]
        return "\n".join(t for t in texts if "Error" in t)[-1500:]

    def shot(self, name: str) -> Path:
        shown = self.page.locator(".smoothkit-figure:visible")
        if shown.count():
            shown.first.evaluate("e => e.closest('.jp-OutputArea').scrollIntoView()")
            self.page.wait_for_timeout(500)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    # --- controls and figures ---

    def slider(self, label: str):
        """The visible slider with this label."""
        label = self.page.locator(f'.widget-label:text-is("{label}"):visible').first
        return label.locator("xpath=..")

    def press(self, label: str, key: str, times: int = 1, handle: int = 0) -> None:
        self.slider(label).locator(".noUi-handle").nth(handle).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def drag(self, label: str, pixels: int, handle: int = 0) -> None:
        box = self.slider(label).locator(".noUi-handle").nth(handle)
        box.scroll_into_view_if_needed()
        at = box.bounding_box()
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + pixels, y, steps=8)
        self.page.mouse.up()

    def type_value(self, label: str, text: str) -> None:
        """Into the number beside the slider, or over the slider's own read-out."""
        slider = self.slider(label)
        number = slider.locator(".widget-readout:visible")
        if number.count() == 0:
            number = slider.locator("xpath=..").locator("input").first
        number.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def figure(self) -> dict:
        """What the live figure in view shows: traces as plotted, title, and the settings it was made with."""
        return self.page.evaluate(
            """() => {
              const g = [...document.querySelectorAll('.smoothkit-figure')].find(e => e.offsetParent && e._fullData);
              if (!g) return null;
              return {title: g._fullLayout.title.text, meta: g._fullLayout.meta,
                      data: g._fullData.map(t => ({name: t.name, type: t.type, x: t.x && [...t.x], y: t.y && [...t.y],
                                                   z: t.z && [...t.z].map(r => r.length === undefined ? r : [...r])}))};
            }"""
        )

    def number(self, label: str) -> float:
        """What the box beside a slider says."""
        return float(self.slider(label).locator("xpath=..").locator("input").first.input_value())

    def brush(self) -> tuple[float, float] | None:
        """The range marked in the live figure in view."""
        found = self.page.evaluate(
            """() => {
              const g = [...document.querySelectorAll('.smoothkit-figure')].find(e => e.offsetParent && e._fullData);
              const s = g._fullLayout.shapes[0];
              return s ? [s.x0, s.x1] : null;
            }"""
        )
        return found and tuple(found)

    def theme(self, name: str) -> None:
        """Settings > Theme, for this page."""
        self.page.get_by_role("menuitem", name="Settings", exact=True).click()
        self.page.get_by_text("Theme", exact=True).hover()
        self.page.get_by_text(f"JupyterLab {name}", exact=True).click()
        self.page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=f"JupyterLab {name}")

    def run_until(self, text: str) -> None:
        """Run the cells down to the one that holds the text."""
        self.page.locator(".jp-CodeCell", has_text=text).first.locator(".cm-content").click()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Above Selected Cell", exact=True).click()
        self.page.wait_for_timeout(500)
        self.page.keyboard.press("Escape")
        self.page.locator(".jp-CodeCell", has_text=text).first.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def contrast(self, selector: str) -> float:
        """The contrast ratio (WCAG 2.1) of a text with the first background behind it."""
        return self.page.evaluate(
            """selector => {
              const e = [...document.querySelectorAll(selector)].find(e => e.offsetParent && e.textContent.trim());
              const parse = c => (c.match(/[\\d.]+/g) ?? []).map(Number);
              let behind = e;
              while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
              const light = c => {
                const [r, g, b] = parse(c).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const pair = [light(getComputedStyle(e).color), light(getComputedStyle(behind).backgroundColor)];
              return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            }""",
            selector,
        )
