"""`nettrace dashboard`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
import webbrowser
from typing import Any

from nettrace.cli.configuration import require
from nettrace.cli.texts import UsageError, add_shared, new_parser, print_json

_EXAMPLES = """
nettrace dashboard runs/x             prints the address of a page of one run
nettrace dashboard 'runs/*'           of several, and of those that come later
nettrace dashboard runs --port 8765   at this port; then it is also seen from
                                      afar, by ssh -L 8765:localhost:8765 HOST
"""


def add(commands: Any) -> None:
    """Adds the command's parser."""
    about = (
        "serve a page that follows runs while they train, to this machine alone; it never writes, "
        "and ends with Ctrl-C"
    )
    parser = new_parser(commands, "dashboard", about, _EXAMPLES)
    parser.set_defaults(run=run)
    require(
        parser.add_argument(
            "traces",
            nargs="*",
            metavar="RUN",
            help="folders of traces, folders that have some below them, or patterns in quotes",
        )
    )
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="where to; by default any that is free"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="open no browser, and print the address alone"
    )
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Serves the page until it is interrupted.

    Raises:
        UsageError: if Plotly is not there, or the port cannot be had.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UsageError("figures need plotly: pip install nettrace[dashboard]")
    from nettrace.dashboard.live import LiveServer  # Plotly takes long to import

    if not 0 <= options.port < 2**16:
        raise UsageError(f"expected --port to be from 0 to 65535, got {options.port}")
    try:
        server = LiveServer(options.traces, options.port)
    except OSError as error:
        raise UsageError(
            f"port {options.port} cannot be had: {error.strerror or error}; give another --port, "
            "or none for one that is free"
        ) from error
    with server:
        if options.json:
            print_json({"address": server.address, "port": server.server_port})
        else:
            print(f"{server.address}\nCtrl-C ends it.")
        sys.stdout.flush()
        if not (options.no_browser or options.json) and _has_screen():
            opened = threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True)
            opened.start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)  # after the ^C that terminals show
    return 0


def _has_screen() -> bool:
    """Whether a browser would not take over the terminal."""
    return sys.platform != "linux" or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
