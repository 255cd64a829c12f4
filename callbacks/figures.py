"""Figures of arrays for loggers that show them, and a table of final values."""

from __future__ import annotations

import base64
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from nettrace.callbacks.loggers import STEP
from nettrace.record import Record
from nettrace.store.kept import Kept
from nettrace.summary import summary

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

#: Where figures and the table of final values are logged.
FIGURES, FINAL = "figures/", "nettrace/final_values"
#: At most so many figures at a time, of so many numbers in all, made in so many seconds.
_MOST, _NUMBERS, _SECONDS = 12, 200_000, 5.0
#: How many bytes and steps are kept for them, and how many steps a matrix is shown at.
_BYTES, _STEPS, _MATRICES = 2**25, 64, 4
#: The first record at which they are made; then at each twice as many, and at the end.
_FIRST = 4
_DRAWING = 15.0  # seconds
#: What is seen first of its kind.
_TELLING = ("ntk/spectrum", "ntk/gram", "ntk/trace_per_layer", "hessian/eigenvalues")
_log = logging.getLogger("nettrace")
_said: set[str] = set()


class Figures:
    """What loggers that show figures get beside numbers: at records 4, 8, 16, ... and at the end.

    W&B, from 0.31 on, gets Plotly figures then, under "figures/", and at the end a table of final
    values, "nettrace/final_values". TensorBoard and MLflow get images of the same figures at the
    end, if Kaleido and Chromium are there to draw them. What is missing for that is said once, by
    the log "nettrace" at level INFO.

    Each time there are at most 12 figures, of arrays and of numbers against each other, those of
    different kinds first, with 200,000 numbers in all (about 2 MB), and none is begun after 5
    seconds; drawing images ends after 15. For them, at most 64 steps in 32 MiB of memory are kept,
    evenly spaced. What is no record, as of a landscape, is sent by `show` and `draw`.

    Args:
        loggers: of a Lightning trainer.
        prefix: put before every name.
    """

    def __init__(self, loggers: Sequence[Any], prefix: str) -> None:
        self._wandb = [one for one in loggers if _is(one, "WandbLogger") and _is_recent()]
        self._tensorboard = [one for one in loggers if _is(one, "TensorBoardLogger")]
        self._mlflow = [one for one in loggers if _is(one, "MLFlowLogger")]
        #: Whether any logger takes figures.
        self.wanted = bool(self._wandb or self._tensorboard or self._mlflow)
        self._prefix = prefix
        self._kept = Kept(_BYTES, _STEPS)
        self._next = _FIRST
        #: The last step that was recorded, and that of Lightning's own.
        self._last = self._step = 0

    def add(self, records: Sequence[Record], coordinates: Mapping[str, float], step: int) -> None:
        """Keeps the records of a step; those on several probes apart, as they are logged.

        Args:
            records: of one step.
            coordinates: of that step, such as the epoch.
            step: under which Lightning itself logs at this moment.
        """
        if self.wanted and records:
            self._last, self._step = records[0].step, step
            self._kept.add([part for record in records for part in _apart(record)], coordinates)

    @property
    def due(self) -> bool:
        """Whether as many records have been kept as the next figures wait for."""
        return bool(self._wandb) and self._kept.count >= self._next

    def send(self) -> list[tuple[str, Exception]]:
        """Sends figures to W&B.

        Returns:
            What could not be done, and why; all else is.
        """
        self._next = 2 * self._kept.count
        return self._sent(last=False)

    def conclude(self) -> list[tuple[str, Exception]]:
        """Sends figures and final values where a training ends; returns as `send`."""
        return self._sent(last=True) if self._kept.count else []

    def show(self, data: xr.Dataset, step: int, trainer_step: int) -> list[tuple[str, Exception]]:
        """Sends figures of what is no record, such as a landscape's, to W&B; returns as `send`.

        Args:
            data: as `nettrace.dashboard.figures` takes it, of one run.
            step: how many updates the weights have had.
            trainer_step: under which Lightning itself logs at this moment.
        """
        self._failed: list[tuple[str, Exception]] = []
        with self._noted("cannot make figures"):
            self._send(self._figures(data) if self._wandb else {}, {}, step, trainer_step)
        return self._failed

    def draw(self, data: xr.Dataset, trainer_step: int) -> list[tuple[str, Exception]]:
        """Sends images of these to TensorBoard and MLflow; takes and returns as `show`."""
        self._failed = []
        with self._noted("cannot make figures"):
            self._draw(
                self._figures(data) if self._tensorboard or self._mlflow else {}, trainer_step
            )
        return self._failed

    def _sent(self, last: bool) -> list[tuple[str, Exception]]:
        self._failed = []
        with self._noted("cannot make figures"):
            data = self._kept.dataset()
            figures = self._figures(data)
            more = {FINAL: _table(data)} if last and self._wandb else {}
            self._send(figures, more, self._last, self._step)
            if last:
                self._draw(figures, self._step)
        return self._failed

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed.append((what, error))

    def _figures(self, data: xr.Dataset) -> dict[str, go.Figure]:
        """By name, as many as there may be."""
        try:
            import plotly  # noqa: F401
        except ImportError:
            _say_once(
                "loggers get no figures, which need Plotly: pip install 'nettrace[dashboard]'"
            )
            return {}
        from nettrace.dashboard import figure
        from nettrace.dashboard.views import kind_of

        found: dict[str, go.Figure] = {}
        left, until = _NUMBERS, time.monotonic() + _SECONDS
        for name in _in_order(data):
            if len(found) == _MOST or time.monotonic() > until:
                break
            seen = data
            if kind_of(data, name) == "matrix":
                places = np.linspace(0, data.sizes["step"] - 1, _MATRICES).round().astype(int)
                seen = data.isel(step=np.unique(places))
            with self._noted("cannot make a figure"):
                made = figure(seen, name)
                numbers = sum(map(_count, made.data))
                if 0 < numbers <= left:
                    found[name] = made
                    left -= numbers
        return found

    def _send(
        self,
        figures: Mapping[str, go.Figure],
        more: Mapping[str, Any],
        step: int,
        trainer_step: int,
    ) -> None:
        for logger in self._wandb if figures or more else ():
            with self._noted(f"cannot log to {type(logger).__name__}"):
                import wandb

                made = {FIGURES + n: wandb.Plotly(_listed(one)) for n, one in figures.items()}
                row = {self._prefix + name: one for name, one in (*made.items(), *more.items())}
                for name in row:
                    logger.experiment.define_metric(name, step_metric=STEP)
                logger.experiment.log({**row, STEP: step, "trainer/global_step": trainer_step})

    def _draw(self, figures: Mapping[str, go.Figure], trainer_step: int) -> None:
        if not figures or not (self._tensorboard or self._mlflow):
            return
        from nettrace.dashboard.images import images

        drawn, why = images(list(figures.values()), _DRAWING)
        if why:
            _say_once(f"TensorBoard and MLflow get no images of figures: {why}")
        found = {n: png for n, png in zip(figures, drawn, strict=True) if png is not None}
        if self._tensorboard and find_spec("PIL") is None:
            _say_once(
                "TensorBoard gets no images of figures, which need Pillow: pip install pillow"
            )
            self._tensorboard = []
        for logger in self._tensorboard if found else ():
            with self._noted(f"cannot log to {type(logger).__name__}"):
                from PIL import Image

                for name, png in found.items():
                    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
                    tag = f"{self._prefix}{FIGURES}{name}"
                    logger.experiment.add_image(tag, pixels, trainer_step, dataformats="HWC")
        for logger in self._mlflow if found else ():
            with (
                self._noted(f"cannot log to {type(logger).__name__}"),
                TemporaryDirectory(prefix="nettrace-") as folder,
            ):
                for name, png in found.items():
                    file = Path(folder, f"{self._prefix}{name}".replace("/", "_") + ".png")
                    file.write_bytes(png)
                    logger.experiment.log_artifact(logger.run_id, os.fspath(file), "figures")


def _is(logger: Any, name: str) -> bool:
    """Whether a logger is of a class by that name, in either of Lightning's namespaces."""
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def _is_recent() -> bool:
    """Whether W&B takes figures and tables without asking its server: old versions wait for that.

    0.18 does so offline too, for minutes. 0.31 was tried.
    """
    found = re.match(r"(\d+)\.(\d+)", version("wandb")) if find_spec("wandb") else None
    if found and (int(found[1]), int(found[2])) >= (0, 31):
        return True
    _say_once("W&B gets no figures: pip install 'wandb>=0.31', as older ones wait for its server")
    return False


def _apart(record: Record) -> Iterator[Record]:
    """What was found on each of several probes; what is missing on all of them is one."""
    return iter([record]) if record.missing is not None else record.apart()


def _in_order(data: xr.Dataset) -> list[str]:
    """Figures of arrays, and of numbers against each other: first one of each kind.

    Of a kind, those in the conventions of other packages come last, as they repeat others.
    """
    from nettrace.dashboard.views import figures, kind_of

    kinds: dict[str, list[str]] = {}

    def rank(name: str) -> int:
        return 2 * name.startswith(("collective/", "nettrace/")) - name.startswith(_TELLING)

    for name in sorted(figures(data), key=rank):
        kind = kind_of(data, name)
        if kind != "track":
            kinds.setdefault(kind, []).append(name)
    return [name for several in zip_longest(*kinds.values()) for name in several if name]


def _listed(figure: go.Figure) -> go.Figure:
    """The same with lists in place of arrays, in seven digits, and None where there is no number.

    W&B draws nothing of arrays that Plotly encodes as bytes (wandb/wandb#9563).
    """
    import plotly.graph_objects as go

    def plain(value: Any) -> Any:
        if isinstance(value, dict) and "bdata" in value:
            data = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
            shape = [int(length) for length in str(value.get("shape", len(data))).split(",")]
            return plain(data.reshape(shape).tolist())
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(one) for one in value]
        if isinstance(value, float):  # of NumPy too
            return float(f"{value:.7g}") if math.isfinite(value) else None
        return value

    return go.Figure(plain(figure.to_dict()))


def _count(trace: Any) -> int:
    """How many numbers a trace of a figure holds."""
    return sum(np.size(trace[key]) for key in ("x", "y", "z", "customdata") if key in trace)


def _table(data: xr.Dataset) -> Any:
    """The last value of each number, with why others are missing, as W&B's table."""
    import wandb

    columns: list[str | int] = [
        "quantity",
        "value",
        "standard error",
        "step",
        "units",
        "convention",
        "missing",
    ]
    rows = []
    for one in summary(data):
        if not one.axes:
            parts = [(one.name, None if one.value is None else one.value.real)]
            if one.value is not None and one.value.imag:  # named as the numbers are
                parts = [(f"{one.name}.re", one.value.real), (f"{one.name}.im", one.value.imag)]
            about = (one.standard_error, one.step, one.units, one.convention, one.missing)
            rows += [[name, value, *about] for name, value in parts]
    return wandb.Table(columns=columns, data=rows)


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.info(text)
