"""The Lightning callback of how weights fluctuate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nettrace.callbacks.trace import Trace
from nettrace.measures import available
from nettrace.schedule import Every, filled
from nettrace.waiting import reads_window
from nettrace.window import Keep, WeightWindow


class WeightFluctuations(Trace):
    """`Trace` of how weights fluctuate over the last updates: the physics of stochastic descent.

    The weights are seen after every update. By default a record is taken when the window is full,
    and then whenever all of it is new: each is of the `length * stride` updates before it, and none
    is of what another has seen. At steps of another schedule the window is that of the last
    updates, which may overlap with others'. At those at which it is not full, as in a run that has
    just been resumed, there is no record; where it is full at none, there is one at the last step,
    which is missing with the reason if it is not full then either.

    Callbacks with the same window share it. Where the loader shuffles a data set of a known size,
    and an epoch takes all of it, theory is told so; see `population` of `WeightWindow`.

    Args:
        measures: names of measures or groups; a group stands for what it has of windows.
        every: as in `Trace`; None for whenever the window is full of what is new.
        length: how many snapshots of the weights make up a window.
        stride: of how many updates one is seen, those whose step is a multiple of it.
        parameters: names of parameters, or patterns such as "layers.1.*".
        keep: what is kept of the weights, as in `nettrace.window.WeightWindow`.
        memory: bytes that the window may take.
        burn_in: how many updates the window does not see, as long as the training is not stationary
            yet.
        options: all others of `Trace`, such as probe, to, log, samples and budget.

    Raises:
        ValueError: if a measure is unknown or none is of a window, the schedule never fires, or an
            argument of the window is none.
    """

    def __init__(
        self,
        measures: str | Iterable[str] = "weights",
        *,
        every: Every | None = None,
        length: int = 360,
        stride: int = 1,
        parameters: str | Sequence[str] = "*",
        keep: Keep | None = None,
        memory: int | str = "256MiB",
        burn_in: int = 0,
        **options: Any,
    ) -> None:
        window = WeightWindow(
            length, stride=stride, parameters=parameters, keep=keep, memory=memory
        )
        new = filled(length * stride, burn_in)
        names = [measures] if isinstance(measures, str) else list(measures or ())
        super().__init__(
            [name for asked in names for name in _of_windows(asked)],
            every=new if every is None else every,
            window=window,
            **options,
        )
        if self.window is None:
            raise ValueError(
                f"none of {names} is of a window of weights: pass them to Trace, or 'weights'"
            )
        self.burn_in = burn_in


def _of_windows(name: str) -> list[str]:
    """What a group has that is of a window; a measure's name, or another, stands for itself."""
    return [m.name for m in available() if m.name.startswith(f"{name}/") and reads_window(m)] or [
        name
    ]
