"""Kernels forked from one process that has imported what notebooks import: seconds less for each, the same cells run.

    warm_kernel.py serve SOCKET          imports, and forks a kernel for everyone who asks; ends with its standard input
    warm_kernel.py ask SOCKET FILE ...   what Jupyter starts for a kernel: asks for one, hands on signals, ends with it

The workbook's own packages are not among the imports, so a notebook still finds out whether they can be imported.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

MODULES = (
    "ipykernel.kernelapp", "pandas", "pyarrow.parquet", "scipy.stats", "sklearn.datasets", "torch", "numba", "timm", "peft",
    "diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_ddpm", "plotly.graph_objects", "plotly.offline",
    "matplotlib.figure", "matplotlib.backends.backend_svg", "matplotlib.backends.backend_pdf", "ipywidgets", "anywidget",
)  # fmt: skip


def serve(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    os.environ["MPLBACKEND"] = (
        "module://matplotlib_inline.backend_inline"  # as a kernel sets it before the first import
    )
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
        asker, _ = server.accept()
        if os.fork() == 0:
            server.close()
            be_a_kernel(asker)
        asker.close()
        with contextlib.suppress(ChildProcessError):  # kernels that ended are waited for when there is time
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


def be_a_kernel(asker: socket.socket) -> None:
    """In the forked process: what was asked for, in the folder and environment of whoever asked."""
    _, files, _, _ = socket.recv_fds(asker, 1, 3)
    asked = json.loads(asker.makefile("rb").readline())
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # whether the asker is there still is seen below
    sys.path[0:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asker.sendall(struct.pack("<q", os.getpid()))
    threading.Thread(target=end_with, args=(asker,), daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.initialize(["-f", *asked["options"]])
    app.start()
    os._exit(0)


def end_with(other: socket.socket) -> None:
    """Nothing comes, until the process at the other end is gone."""
    while other.recv(1):
        pass
    os._exit(1)


def ask(path: str, *options: str) -> None:
    asker = socket.socket(socket.AF_UNIX)
    asker.connect(path)
    asked = {"options": options, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
    socket.send_fds(asker, [b"!"], [0, 1, 2])
    asker.sendall(json.dumps(asked).encode() + b"\n")
    (pid,) = struct.unpack("<q", asker.recv(8, socket.MSG_WAITALL))

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    signal.signal(signal.SIGINT, hand_on)
    signal.signal(signal.SIGTERM, hand_on)
    end_with(asker)


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
