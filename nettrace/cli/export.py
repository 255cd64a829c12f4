"""`nettrace export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nettrace import exports, store
from nettrace.cli.configuration import require
from nettrace.cli.texts import UsageError, add_shared, new_parser, print_json, split

_EXAMPLES = """
nettrace export runs/x --to netcdf                   one file, x.nc
nettrace export runs/x --to csv --names loss,ntk     a folder of tables, x-csv
nettrace export runs/seed-* --to parquet -o all.parquet
nettrace export runs/x -o figures/x.zarr
"""
_COUNTED = ("run", "step")
_SUFFIXES = {format: suffix for suffix, format in exports.SUFFIXES.items()} | {"csv": "-csv"}


def add(commands: Any) -> None:
    """Adds the command's parser."""
    about = "write a trace, or several as one, in a format that other programs read"
    parser = new_parser(commands, "export", about, _EXAMPLES)
    parser.set_defaults(run=run)
    require(
        parser.add_argument(
            "traces",
            nargs="*",
            metavar="TRACE",
            help="folders of traces; several are told apart along a dimension, or column, run",
        )
    )
    parser.add_argument(
        "--to",
        choices=exports.FORMATS,
        help="the format: netcdf and zarr hold the data set as nettrace.open gives it, parquet a "
        "row a step with arrays as lists, csv a folder of tables; by default what the suffix of "
        "--output says",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="where to; by default as the trace, in this folder"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="quantities or groups, by commas or spaces"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Writes the export, and prints where it is.

    Raises:
        UsageError: if there is no trace, no such quantity, or something in the way.
    """
    if options.to is None and options.output is None:
        raise UsageError(f"in which format? Give --to {', '.join(exports.FORMATS)}, or --output")
    traces = options.traces[0] if len(options.traces) == 1 else options.traces
    output = options.output or _name(options.traces) + _SUFFIXES[options.to]
    try:
        data = store.open(traces, split(options.names) or None)
        found = exports.export(data, output, options.to, overwrite=options.overwrite)
    except KeyError as error:
        raise UsageError(str(error.args[0])) from error
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    if options.json:
        names = [v.attrs.get("name", name) for name, v in data.data_vars.items()]
        print_json({"export": str(found), "quantities": names, "sizes": dict(data.sizes)})
    else:
        sizes = ", ".join(f"{size:,} {dim}s" for dim, size in data.sizes.items() if dim in _COUNTED)
        print(f"{found}: {len(data.data_vars)} quantities at {sizes}")
    return 0


def _name(traces: list[str]) -> str:
    return Path(traces[0]).resolve().name if len(traces) == 1 else "runs"
