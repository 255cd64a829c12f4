"""Where a trace comes from: versions, the state of the code, the device, seeds."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nettrace.probe import Probe

#: A repository too large to answer within these seconds is left out.
_PATIENCE = 2.0


def of_process() -> dict[str, str | int]:
    """What is known without a network: time, versions, threads, seeds, and the code's commit.

    The commit is that of the current folder, if git is there and answers within two seconds; it
    ends in "+" if files differ from it.
    """
    found: dict[str, str | int] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "nettrace": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch_seed": str(torch.initial_seed()),  # of 64 bits: too long for some formats
    }
    for name in ("pytorch_lightning", "lightning", "transformers"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    if "PL_GLOBAL_SEED" in os.environ:
        found["lightning_seed"] = os.environ["PL_GLOBAL_SEED"]
    commit = _git("rev-parse", "HEAD")
    if commit:
        changes = _git("status", "--porcelain", "--untracked-files=no")
        found["git_commit"] = commit + ("+" if changes else "")
    return found


def of_model(model: nn.Module) -> dict[str, Any]:
    """The network's class, size, types and devices."""
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    devices = {p.device for p in parameters}
    names = {torch.cuda.get_device_name(d) for d in devices if d.type == "cuda"}
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "device": ", ".join(sorted(names | {d.type for d in devices if d.type != "cuda"})),
    }


def of_probe(probe: Probe | Mapping[str, Probe]) -> str:
    """What beside the samples decides on what is measured on them."""
    several = {"": probe} if isinstance(probe, Probe) else probe
    texts = []
    for name, one in several.items():
        options = {
            "forward": one.forward,
            "losses": one.losses,
            "likelihood": one.likelihood,
            "class_axis": one.class_axis,
        }
        given = [f"{k}={name_of(v)}" for k, v in options.items() if v is not None]
        texts.append(" ".join([*([name] if name else []), f"{len(one)} samples", *given]))
    return "; ".join(texts)


def name_of(value: Any) -> str:
    """A text that is the same in another process for what is meant to be the same."""
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, nn.Module):
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:8]
        return f"{name_of(type(value))} {digest}"
    if isinstance(value, functools.partial):
        return f"{name_of(value.func)} {value.args} {value.keywords}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return f"{name_of(type(value))} {getattr(value, '__dict__', '')}"


def _version() -> str:
    from nettrace import __version__

    return __version__


def _git(*command: str) -> str:
    try:
        found = subprocess.run(
            ["git", *command],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # nothing is written, not even a cache
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return found.stdout.strip()
