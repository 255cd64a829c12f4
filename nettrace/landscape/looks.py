"""What is looked at in copies of a network beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cosine_similarity

from nettrace.landscape.continuous import ContinuousWalkers
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.probe import Probe

#: The samples of a probe, or a function of tensors (W, ...) of all parameters by name, giving (W,).
Observable: TypeAlias = Probe | Callable[[Mapping[str, Tensor]], Tensor]
Look: TypeAlias = Callable[[ContinuousWalkers], Tensor]


class Looks:
    """Observables of walkers, by name.

    Args:
        model: the network.
        loss: which weights vary.
        parameters: their names or patterns.
        observables: as for `loss_density`.

    Raises:
        TypeError: if one is neither a probe nor a function.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: WeightLoss,
        parameters: str | Sequence[str],
        observables: Mapping[str, Observable],
    ) -> None:
        self._split = vmap(loss.split)
        point = loss.point.double()
        self.found: dict[str, Look] = {"norm": lambda w: w.weights.double().norm(dim=1).cpu()}
        if float(point.norm()) > 0:
            self.found["overlap"] = lambda w: cosine_similarity(w.weights.double(), point).cpu()
        for name, one in observables.items():
            if isinstance(one, Probe):
                other = WeightLoss(model, one, parameters)
                rows = len(other.samples_of(other.point[None])[0])
                held = _Held(other)
                for row, what in enumerate(("loss", "error_rate")[:rows]):
                    self.found[f"{name}_{what}"] = held.row(row)
            elif callable(one):
                self.found[name] = self._called(name, one)
            else:
                raise TypeError(
                    f"expected observables= to be probes or functions, got {type(one).__name__} "
                    f"for {name!r}"
                )

    def _called(self, name: str, function: Callable[[Mapping[str, Tensor]], Tensor]) -> Look:
        def look(walkers: ContinuousWalkers) -> Tensor:
            found = function(self._split(walkers.weights))
            if found.shape != walkers.losses.shape:
                raise ValueError(
                    f"expected the observable {name!r} to give a number for each of the "
                    f"{len(walkers.losses)} copies, got shape {tuple(found.shape)}"
                )
            return found.detach().cpu()

        return look


class _Held:
    """What a probe's samples say of walkers, once for all that is asked between two moves."""

    def __init__(self, loss: WeightLoss) -> None:
        self._loss = loss
        self._moves = -1

    def row(self, number: int) -> Look:
        def look(walkers: ContinuousWalkers) -> Tensor:
            if walkers.moves != self._moves:
                self._moves = walkers.moves
                self._found = self._loss.samples_of(walkers.weights).mean(2).cpu()
            return self._found[:, number]

        return look
