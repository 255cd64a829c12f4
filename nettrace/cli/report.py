"""`nettrace report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nettrace.cli.configuration import require
from nettrace.cli.texts import UsageError, add_shared, new_parser, print_json, split

_EXAMPLES = """
nettrace report runs/x                               one page, x.html
nettrace report runs/seed-* --group learning_rate -o all.html
nettrace report runs/x --names ntk,loss --format pdf
nettrace report runs/x/landscape                     results of landscape probes
"""
_FORMATS = ("html", "pdf", "png")


def add(commands: Any) -> None:
    """Adds the command's parser."""
    about = "draw a trace, or several compared, as a page that opens without a network"
    parser = new_parser(commands, "report", about, _EXAMPLES)
    parser.set_defaults(run=run)
    require(
        parser.add_argument(
            "traces",
            nargs="*",
            metavar="TRACE",
            help="folders of traces; several are compared. Results of landscape probes are shown "
            "too, where they are in a trace's folder or one below it, or in a folder given here",
        )
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="where to; by default as the trace, in this folder"
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="of the page; pdf and png are printed by a Chromium or Chrome on PATH; by default "
        "what the suffix of --output says, or html",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="quantities or groups, by commas or spaces"
    )
    parser.add_argument(
        "--group",
        default="",
        metavar="KEY",
        help="of several runs, which hyperparameter or other provenance puts them together: of "
        "each group medians and quantiles are drawn",
    )
    parser.add_argument("--title", default="", help="of the page")
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Writes the page, and prints where it is.

    Raises:
        UsageError: if there is no trace, no such quantity, or what a format needs is missing.
    """
    suffix = Path(options.output or "").suffix.removeprefix(".")
    form = options.format or (suffix if suffix in _FORMATS else "html")
    if suffix and suffix != form and (suffix in _FORMATS or not options.format):
        raise UsageError(
            f"--output ends in .{suffix}, and the page would be {form}: end it in .html, .pdf or "
            ".png"
        )
    output = Path(options.output or f"{_name(options.traces)}.{form}")
    try:
        from nettrace.dashboard import printing, report
        from nettrace.dashboard.landscape_folders import opened
    except ImportError as error:
        need = "a report needs Plotly: pip install 'nettrace[dashboard]'"
        raise UsageError(f"{need} ({error})") from error
    try:
        data, landscapes = opened(options.traces, split(options.names))
        page = report.report(data, title=options.title, group=options.group, landscapes=landscapes)
        if form == "html":
            output.write_text(page, encoding="utf-8")
        else:
            printing.printed(page, output, form)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    size = output.stat().st_size
    if options.json:
        print_json({"report": str(output), "bytes": size})
    else:
        print(f"{output}: {size / 1e6:.1f} MB")
    return 0


def _name(traces: list[str]) -> str:
    return Path(traces[0]).resolve().name if len(traces) == 1 else "runs"
