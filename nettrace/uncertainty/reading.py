"""Batches, read for what uncertainties are made of: each position's features and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nettrace.batch import Select
from nettrace.inference import LikelihoodName, infer
from nettrace.last_layer import LastLayer, last_layer
from nettrace.likelihood import Categorical, Gaussian, Likelihood, alike
from nettrace.probe import Forward, Probe
from nettrace.uncertainty.calibration import Rows
from nettrace.uncertainty.covariance import Covariance
from nettrace.uncertainty.fitted import Head, with_ones

#: Numbers that are kept of features and outputs; of more, each second row is left out, and so on.
MOST = 2**26
#: The class of what is to be ignored, as by losses.
IGNORED = -100


class Reader:
    """Reads batches by a network that is frozen meanwhile.

    Args:
        model: the network.
        head: the name of its last linear layer, None to find it.
        likelihood: what outputs are parameters of, None for what targets suggest.
        forward: as in `nettrace.Probe`.
        select: as in `nettrace.Probe`.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None,
        likelihood: LikelihoodName | Likelihood | None,
        forward: Forward | None,
        select: Select | None,
    ) -> None:
        self._model = model
        self._name = head
        self._given = likelihood
        self._options: dict[str, Any] = {"forward": forward, "select": select}
        self._device = next(model.parameters(), torch.empty(0)).device
        self._head: Head | None = None
        self._number = ""
        #: What the outputs are parameters of, once there were targets.
        self.likelihood: Likelihood | None = None

    @property
    def head(self) -> Head:
        """The head, once something was read."""
        assert self._head is not None
        return self._head

    def read(
        self, loader: Iterable[Any], what: str, keeping: bool
    ) -> tuple[Covariance, Rows | None]:
        """The covariance of all features, and what is to be kept of each position.

        Args:
            loader: the batches.
            what: the name of the argument that they came by.
            keeping: whether to keep rows.

        Raises:
            ValueError: if there are no batches, or no targets where rows are to be kept, or numbers
                are not finite; batches are named by their number.
        """
        covariance: Covariance | None = None
        parts: list[Rows] = []
        step = 1
        for number, batch in enumerate(loader):
            self._number = f"{number} of {what}="
            try:
                rows, with_targets = self._rows(batch)
            except Exception as error:
                error.add_note(f"in batch {self._number}")
                raise
            new = Covariance.of(rows.features)
            covariance = new if covariance is None else covariance + new
            if keeping and with_targets:
                parts.append(rows.every(step))
                while _numbers(parts) > MOST and sum(len(p.targets) for p in parts) > 1:
                    step, parts = 2 * step, [_joined(parts).every(2)]
        if covariance is None or covariance.count == 0:
            raise ValueError(
                f"{what}= is empty: expected batches of samples; an iterator that was read before "
                "has no more"
            )
        if keeping and not sum(len(p.targets) for p in parts):
            raise ValueError(
                f"no batch of {what}= has targets, on which to calibrate alpha and the ridge: pass "
                "pairs of inputs and targets, or both alpha= and ridge="
            )
        return covariance, _joined(parts) if parts else None

    def _rows(self, batch: Any) -> tuple[Rows, bool]:
        """Each position, and whether there are targets."""
        probe = Probe.from_batch(batch, **self._options).to(self._device)
        layer = last_layer(self._model, probe, self._name)
        if self._head is None:
            self._head = Head.of(layer, self._name, self._model)
        head, count = self._head, len(layer.weight)
        if (layer.name, count) != (head.name, head.outputs):
            raise ValueError(
                f"the last linear layer is {layer.name!r} with {count} outputs, but was "
                f"{head.name!r} with {head.outputs} in batches before: pass head="
            )
        tensors = {"features": layer.features, "outputs": layer.outputs, "targets": probe.targets}
        for name, one in tensors.items():
            if isinstance(one, Tensor) and not bool(one.isfinite().all()):
                raise ValueError(
                    f"the {name} of batch {self._number} are not finite: there is NaN or infinity "
                    "in the samples, or in the network"
                )
        features = with_ones(layer).flatten(0, -2)
        outputs = layer.by_position(layer.outputs).flatten(0, -2)
        if not isinstance(probe.targets, Tensor):
            if self.likelihood is None and not isinstance(self._given, str):
                self.likelihood = self._given
            return Rows(features, outputs, outputs[:, 0]), False
        if self.likelihood is None:
            self.likelihood = kind_of(layer, probe.targets, self._given)
        targets = targets_of(layer, probe.targets, self.likelihood)
        rows = Rows(features, outputs, targets)
        if isinstance(self.likelihood, Categorical):
            rows = rows.where(targets != IGNORED)
        return rows, True


def kind_of(
    layer: LastLayer, targets: Tensor, likelihood: LikelihoodName | Likelihood | None
) -> Likelihood:
    """Whether outputs are numbers or logits of classes.

    Raises:
        ValueError: if that is not known, or something else, classes run along no axis of the
            head's outputs, or these are not finite.
    """
    if not bool(layer.outputs.isfinite().all()):
        raise ValueError(
            "the outputs are not finite: there is NaN or infinity in the samples, or in the network"
        )
    found = infer(layer.outputs, targets, likelihood, None)
    if isinstance(found, Categorical):
        scores = layer.outputs.movedim(found.axis, -1)
        own = layer.by_position(layer.outputs)
        if own.shape != scores.shape or not torch.equal(own, scores):
            raise ValueError(
                f"the classes run along axis {found.axis} of outputs of shape "
                f"{tuple(layer.outputs.shape)}, but the outputs of {layer.name!r} do not: return "
                "its results by forward="
            )
        return found
    if isinstance(found, Gaussian):
        return found
    name = "unknown" if found is None else repr(getattr(found, "name", found))
    raise ValueError(
        f"expected outputs with a gaussian or categorical likelihood, but that of outputs of shape "
        f"{tuple(layer.outputs.shape)} with {targets.dtype} targets of shape "
        f"{tuple(targets.shape)} is {name}: pass likelihood='gaussian' or 'categorical'"
    )


def targets_of(layer: LastLayer, targets: Tensor, likelihood: Likelihood) -> Tensor:
    """(R,) the classes of all positions, or (R, C) the numbers.

    Raises:
        ValueError: if they do not fit the outputs.
    """
    if not isinstance(likelihood, Categorical):
        if not alike(targets, layer.outputs):
            raise ValueError(
                f"expected targets of the outputs' shape {tuple(layer.outputs.shape)}, got "
                f"{tuple(targets.shape)}"
            )
        return layer.by_position(targets.reshape(layer.outputs.shape)).flatten(0, -2)
    found, classes = targets.reshape(-1), len(layer.weight)
    expected = layer.outputs.movedim(likelihood.axis, -1).shape[:-1]
    if found.is_floating_point() or targets.shape != expected:
        raise ValueError(
            f"expected classes of shape {tuple(expected)}, got {targets.dtype} targets of shape "
            f"{tuple(targets.shape)}"
        )
    wrong = found[((found < 0) | (found >= classes)) & (found != IGNORED)]
    if len(wrong):
        raise ValueError(
            f"expected classes from 0 to {classes - 1}, or {IGNORED} for those to ignore, got "
            f"{int(wrong[0])}"
        )
    return found.long()


def _numbers(parts: list[Rows]) -> int:
    return sum(p.features.numel() + p.outputs.numel() for p in parts)


def _joined(parts: list[Rows]) -> Rows:
    return Rows(
        torch.cat([p.features for p in parts]),
        torch.cat([p.outputs for p in parts]),
        torch.cat([p.targets for p in parts]),
    )
