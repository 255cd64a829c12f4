"""Probes of the landscape at chosen steps of a training, from the network as it is there."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from torch import nn

from nettrace.batch import digest_of
from nettrace.freeze import frozen
from nettrace.landscape.folder import file_of, read
from nettrace.landscape.run import write
from nettrace.missing import regardless_of_numbers, told, warn_missing
from nettrace.probe import Probe
from nettrace.ranks import by_first, purpose
from nettrace.recording import OnError
from nettrace.schedule import Every, schedule
from nettrace.store.provenance import name_of, of_probe
from nettrace.unwrapped import plain_model

if TYPE_CHECKING:
    import xarray as xr

#: `f(model, probe, *, seconds, progress, to) -> xarray.Dataset`, such as
#: `nettrace.landscape.slice_1d`, or one with other arguments by `functools.partial`.
Function: TypeAlias = Callable[..., Any]
#: One function, several, or several by names of one's own.
Functions: TypeAlias = Function | Iterable[Function] | Mapping[str, Function]

_NAME = re.compile(r"\w[\w .=+-]*")


class Prober:
    """Probes the landscape around a network at chosen steps; to be called after each update.

    The network is left bitwise as it is, random streams included; it is in eval mode meanwhile.
    Of several processes the first probes alone, and the others wait for it without a collective
    that could time out; so parameters must be whole in each.

    Args:
        functions: what to call, one function, several or a mapping of names to them: any
            `f(model, probe, *, seconds, progress, to) -> xarray.Dataset`, such as those of
            `nettrace.landscape`; `functools.partial` gives them other arguments. By default they
            have the names that they are defined by.
        probe: the samples, with targets.
        every: a period in steps, "log", the steps themselves, or a function from a step to yes or
            no, as in `nettrace.schedule`.
        to: a folder for results, which `nettrace.landscape.open` reads: "<function>/step_<step>.nc"
            with what there is so far every few seconds, so that a process that is killed leaves it.
            One that is there, of the same weights, samples and arguments, is not found again; else
            it is replaced, so that each run needs a folder of its own. None keeps nothing on disk.
        seconds: how long all functions together may take at a step, as far as they keep to it:
            each is given an even share of what is left. None for as long as it takes.
        progress: whether they show progress bars.
        on_error: "record" notes why a result is missing, warns once and lets the training go on;
            "raise" raises.

    Raises:
        ValueError: if a name cannot be that of a folder or is there twice, the schedule never
            fires, or there is no time.
        TypeError: if a function cannot be called so.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import Prober, slice_1d
        >>> model = torch.nn.Linear(3, 1)
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randn(8, 1))
        >>> prober = Prober(slice_1d, probe, every=10)
        >>> [sorted(prober(model, step)) for step in (0, 1)]
        [['slice_1d'], []]
    """

    def __init__(
        self,
        functions: Functions,
        probe: Probe,
        *,
        every: Every = 1,
        to: str | Path | None = None,
        seconds: float | None = 60.0,
        progress: bool = False,
        on_error: OnError = "record",
    ) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(
                f"expected a nettrace.Probe, got {type(probe).__name__}: wrap samples as "
                "Probe(inputs, targets)"
            )
        check(seconds, to, on_error)
        self.functions = by_name(functions)
        self.probe = probe
        self.due = schedule(every)
        self.to = to
        self.seconds = math.inf if seconds is None else seconds
        self.progress = progress
        self.on_error = on_error
        self._purpose = purpose(f"Prober {' '.join(self.functions)} {to}")
        self._said: set[str] = set()

    def __call__(self, model: nn.Module, step: int) -> dict[str, xr.Dataset]:
        """Probes, if that is due.

        Args:
            model: the network.
            step: how many updates its weights have had.

        Returns:
            What was found anew, by the names of functions; nothing but in the first of several
            processes.

        Raises:
            KeyboardInterrupt: if it was interrupted; what there was by then is kept in `to`.
        """
        if not self.due(step):
            return {}
        found: dict[str, xr.Dataset] = {}
        by_first(f"{self._purpose}/{step}", lambda: found.update(self.each(model, step)))
        return found

    def each(self, model: nn.Module, step: int) -> Iterator[tuple[str, xr.Dataset]]:
        """Probes whether that is due or not, in this process; gives each result as it comes.

        Raises:
            KeyboardInterrupt: after the result that was interrupted.
        """
        step = operator.index(step)
        network = plain_model(model)
        begun = time.monotonic()
        for number, (name, function) in enumerate(self.functions.items()):
            left = self.seconds - (time.monotonic() - begun)
            try:
                found = self._found(
                    name, function, network, step, left / (len(self.functions) - number)
                )
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._miss(name, step, told(error))
                continue
            if found is not None:
                yield name, found
                if found.attrs["stopped"] == "interrupted":
                    raise KeyboardInterrupt

    def _found(
        self, name: str, function: Function, model: nn.Module, step: int, seconds: float
    ) -> xr.Dataset | None:
        """What a function finds; None if that is there already."""
        import xarray as xr

        path, about = None, {}
        if self.to is not None:
            path, about = file_of(self.to, name, step), self._about(function, model)
            if self._is_done(path, about):
                return None
            path.unlink(missing_ok=True)  # so that what is there in the end is of this call
        own = getattr(function, "keywords", {}).get("seconds")
        seconds = min(seconds, math.inf if own is None else own)
        if seconds <= 0:
            raise TimeoutError(
                f"the functions before took all of seconds={self.seconds:g}: give more, or fewer "
                "functions"
            )
        with frozen(model):
            found = function(
                model,
                self.probe,
                seconds=None if math.isinf(seconds) else seconds,
                progress=self.progress,
                to=path,
            )
        if not isinstance(found, xr.Dataset):
            raise TypeError(
                f"expected {name} to return an xarray.Dataset, got {type(found).__name__}"
            )
        found = found.assign_attrs({"stopped": "done", **found.attrs, **about})
        if path is not None:
            write(found, path)
        return found

    def _miss(self, name: str, step: int, reason: str) -> None:
        """Says and notes that a function failed, beside what it had found."""
        import xarray as xr

        if self.to is not None:
            path = file_of(self.to, name, step)
            with suppress(OSError, ValueError):  # of the disk, which then is the reason
                found = read(path) if path.exists() else xr.Dataset()
                write(found.assign_attrs(stopped="failed", missing=reason), path)
        once = f"{name} {regardless_of_numbers(reason)}"
        if once not in self._said:
            self._said.add(once)
            warn_missing(
                f"{name} is missing at step {step}: {reason}. The training goes on without; "
                "on_error='raise' would raise this",
                stacklevel=4,
            )

    def _about(self, function: Function, model: nn.Module) -> dict[str, str | float]:
        """What a result depends on."""
        return {
            "weights": digest_of([*model.parameters(), *model.buffers()]).hexdigest()[:16],
            "probe": f"{of_probe(self.probe)} {self.probe.fingerprint()}",
            "function": name_of(function),
            "seconds_allowed": self.seconds,
        }

    def _is_done(self, path: Path, about: Mapping[str, str | float]) -> bool:
        """Whether a file holds what would be found, or as much as there is time for."""
        try:
            found = read(path).attrs if path.exists() else {}
        except ValueError:
            return False
        if any(found.get(key) != about[key] for key in ("weights", "probe", "function")):
            return False
        enough = found["seconds_allowed"] >= self.seconds
        return found["stopped"] == "done" or (found["stopped"] == "out of time" and bool(enough))


def by_name(functions: Functions) -> dict[str, Function]:
    """Functions by the names that are given, or else by their own.

    Raises:
        ValueError: if there are none, or a name cannot be that of a folder or is there twice.
        TypeError: if one cannot be called as probes are.
    """
    if isinstance(functions, Mapping):
        found = dict(functions)
    else:
        found = {}
        for one in [functions] if callable(functions) else functions:
            if (name := _own_name(one)) in found:
                raise ValueError(
                    f"two functions are called {name!r}: give them names of your own, as in "
                    f"{{'{name}_wide': ..., '{name}_narrow': ...}}"
                )
            found[name] = one
    if not found:
        raise ValueError("expected a function that probes the landscape, or several, got none")
    for name, function in found.items():
        _check_call(name, function)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"expected names that folders can have, got {name!r}: name functions by a mapping"
            )
    return found


def check(seconds: float | None, to: object, on_error: str) -> None:
    """Checks arguments.

    Raises:
        ValueError: if there is no time, or `on_error` is unknown.
        TypeError: if `to` is no path.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"expected seconds= to be positive, or None for any time, got {seconds!r}")
    if to is not None and not isinstance(to, (str, Path)):
        raise TypeError(f"expected to= to be a folder's path, got {type(to).__name__}")
    if on_error not in get_args(OnError):
        raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")


def _own_name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _check_call(name: str, function: Function) -> None:
    if not callable(function):
        raise TypeError(
            f"expected {name} to be a function such as nettrace.landscape.slice_1d, got "
            f"{type(function).__name__}"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # of what does not tell
        return
    try:
        signature.bind(None, None, seconds=None, progress=False, to=None)
    except TypeError as error:
        raise TypeError(
            f"{name} cannot be called as {name}(model, probe, seconds=..., progress=..., to=...): "
            f"{error}; functools.partial gives a function what else it needs"
        ) from None
