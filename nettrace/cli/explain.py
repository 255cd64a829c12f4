"""`nettrace explain`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from torch import nn

from nettrace import checkpoints, locate
from nettrace.certificate import Certificate
from nettrace.cli.configuration import require
from nettrace.cli.texts import (
    DATA,
    UsageError,
    add_measures,
    add_shared,
    new_parser,
    print_json,
    split,
    width,
    wrapped,
)
from nettrace.explanation import Explanation
from nettrace.measures import available
from nettrace.price import Price
from nettrace.probe import Probe
from nettrace.statistics import Statistics
from nettrace.tracer import Tracer

_ABOUT = "say how the derivatives of a network are found, check them, and state what they cost"
_EXAMPLES = """
nettrace explain model.py:build --data model.py:probe
nettrace explain model.py:build --data model.py:probe --measures ntk,loss
nettrace explain model.py:build --data model.py:probe --checkpoint last.ckpt
nettrace explain --checkpoint bert/ --data data.py:probe --json
"""


def add(commands: Any) -> None:
    """Adds the command's parser."""
    parser = new_parser(commands, "explain", _ABOUT, _EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        nargs="?",
        help="the network, or a function that builds it, as module:name or path/to/file.py:name; "
        "not needed where the checkpoint says what it is of",
    )
    require(parser.add_argument("--data", metavar="NAME", help=f"required: {DATA}"))
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="weights to load, in any format that analyze takes"
    )
    add_measures(parser, "measures to price, by commas or spaces; by default all")
    parser.add_argument(
        "--memory", default="2GiB", metavar="SIZE", help="memory budget (%(default)s)"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="above how many a measure would be refused (%(default)g)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code that a checkpoint may hold; only if you trust its author",
    )
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the certificate of a network on a probe, and what its measures cost.

    Raises:
        UsageError: if there is no certificate.
        LocateError: if there is no such network or probe.
    """
    names = split(options.measures) or [measure.name for measure in available()]
    model = _model(options)
    probe = locate.probe(options.data)
    try:
        tracer = Tracer(probe, names, memory_budget=options.memory, max_seconds=options.max_seconds)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        certificate = tracer.certify(model)
        explanation = tracer.explain(model)
    except Exception as error:  # samples that are coupled, or whatever the network raises
        raise UsageError(f"no certificate: {type(error).__name__}: {error}") from error
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    probes = [repr(probe)] if isinstance(probe, Probe) else [f"{k}: {p}" for k, p in probe.items()]
    if options.json:
        print_json(
            {
                "network": type(model).__name__,
                "parameters": sizes,
                "probe": probes,
                "certificate": json.loads(certificate.as_json()),
                "prices": _prices(explanation),
            }
        )
        return 0
    print(f"{type(model).__name__}, {sum(sizes.values()):,} parameters in {len(sizes)} tensors")
    print("\n".join(probes), end="\n\n")
    print(certificate.table(width()), end="\n\n")
    print(explanation.table(width()))
    _say_what_is_estimated(certificate)
    return 0


def _model(options: argparse.Namespace) -> nn.Module:
    if options.model is None and options.checkpoint is None:
        raise UsageError(
            "which network? Give it as module:name, or a --checkpoint that says what it is of"
        )
    try:
        if options.checkpoint is None:
            return locate.model(options.model)
        model = checkpoints.build(options.checkpoint, options.allow_pickle, options.model)
        contents = checkpoints.load(options.checkpoint, options.allow_pickle)
        checkpoints.restore(model, contents.state)
    except checkpoints.CheckpointError as error:
        raise UsageError(str(error)) from error
    return model


def _prices(explanation: Explanation) -> dict[str, Any]:
    def told(price: Price) -> dict[str, float]:
        found = dataclasses.asdict(price)
        return {"backward_passes" if k == "passes" else k: v for k, v in found.items()}

    refused = {name: error.why for name, error in explanation.refused.items()}
    return {
        "measures": {
            name: {**told(price), "refused": refused.get(name)}
            for name, price in explanation.measures.items()
        },
        "together": told(explanation.together),
        "look": told(explanation.look),
        "spot_check": told(explanation.check),
    }


def _say_what_is_estimated(certificate: Certificate) -> None:
    if certificate.outputs > Statistics.exact_outputs:
        print(
            wrapped(
                f"There are {certificate.outputs:,} outputs, more than {Statistics.exact_outputs}: "
                f"ntk/trace is an estimate to {Statistics.relative_error:.0%}, priced at the "
                "fewest passes that it can take; Jacobian.trace() is exact."
            )
        )
