"""Figures as images, drawn by Kaleido and Chromium in a process of their own, if they are there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What the process does: each line that it reads is a figure. Nothing of a training is imported.
_CODE = """
import os, sys, kaleido, plotly.io
start = getattr(kaleido, "start_sync_server", None)
if start:
    start(silence_warnings=True)
for number, line in enumerate(sys.stdin):
    figure = plotly.io.from_json(line)
    height = figure.layout.height or 380
    plotly.io.write_image(figure, f"{sys.argv[1]}/{number}.part.png", width=900, height=height)
    os.replace(f"{sys.argv[1]}/{number}.part.png", f"{sys.argv[1]}/{number}.png")
if start:
    kaleido.stop_sync_server(silence_warnings=True)
"""


def images(figures: Sequence[go.Figure], seconds: float = 30.0) -> tuple[list[bytes | None], str]:
    """Figures as PNG, 900 pixels wide.

    Args:
        figures: of Plotly.
        seconds: after which drawing ends; what is drawn by then is given.

    Returns:
        The images, None for those that were not drawn, and what kept them from it, if anything.
    """
    if find_spec("kaleido") is None:
        return [None] * len(figures), "kaleido is not installed (pip install kaleido)"
    why = ""
    with TemporaryDirectory(prefix="nettrace-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            lines = "".join(f"{figure.to_json()}\n" for figure in figures)
            _, said = process.communicate(lines.encode(), seconds)
            if process.returncode:
                last = said.decode(errors="replace").strip().splitlines()
                why = last[-1] if last else f"drawing ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"drawing took longer than {seconds:g} seconds"
        finally:
            _end(process)
        files = [Path(folder, f"{number}.png") for number in range(len(figures))]
        return [file.read_bytes() if file.is_file() else None for file in files], why


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and the browser that it may have begun."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
