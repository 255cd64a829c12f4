"""Predictions with their variances, from a network and what was fitted to its last layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nettrace.batch import Select, digest_of
from nettrace.estimators import generator as own_generator
from nettrace.freeze import evaluating
from nettrace.last_layer import LastLayer, last_layer
from nettrace.likelihood import Categorical, Gaussian, Likelihood
from nettrace.probe import Forward, Probe
from nettrace.uncertainty.calibration import Calibrated, probit
from nettrace.uncertainty.covariance import Covariance, wide
from nettrace.unwrapped import plain_model

#: Of what is saved; another number for another layout.
_FORMAT = 1


@dataclass(frozen=True)
class Prediction:
    """What a network predicts, and how sure it is.

    Args:
        mean: (N, ...) the outputs.
        variance: (N, ...) of targets about them, where alpha was calibrated on residuals, which
            holds their noise too; the network's alone, without noise, where alpha and ridge were
            given as those of Bayesian linear regression; of classes, that of logits. In the
            outputs' precision, but not below float32.
        probabilities: (N, ...) of classes, with their variance taken account of; None for numbers.
    """

    mean: Tensor
    variance: Tensor
    probabilities: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """(N, ...) standard deviations."""
        return self.variance.sqrt()


@dataclass(frozen=True)
class Derived:
    """A quantity made of predictions.

    Args:
        value: what the function gave.
        variance: of the same shape.
    """

    value: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations."""
        return self.variance.sqrt()


@dataclass(frozen=True)
class Head:
    """Which last layer it was.

    Args:
        name: of the layer.
        named: whether its results were asked for by that name, or another.
        outputs: C.
        biased: whether it has a bias.
        digest: of all of the network's parameters and buffers.
    """

    name: str
    named: str | None
    outputs: int
    biased: bool
    digest: str

    @classmethod
    def of(cls, layer: LastLayer, named: str | None, model: nn.Module) -> Head:
        """That of a layer of a network."""
        digest = digest_of(_state(model)).hexdigest()
        return cls(layer.name, named, len(layer.weight), layer.bias is not None, digest)


def with_ones(layer: LastLayer) -> Tensor:
    """(N, ..., D) the features, with 1 appended where there is a bias."""
    features = layer.features.detach()
    if layer.bias is None:
        return features
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)


class Uncertainties:
    """Predictions with their variances; made by `nettrace.uncertainty.fit` and `load`.

    Args:
        model: the network.
        head: its last layer.
        covariance: of the training samples' features.
        scaled: alpha and the ridge.
        likelihood: what the outputs are parameters of, if it is known.
        doubts: what to bear in mind.
        calibrated_on: how many positions alpha and the ridge are from.
        forward: as in `nettrace.Probe`.
        select: as in `nettrace.Probe`.

    Attributes:
        alpha: (C,) of each output.
        ridge: in units of the features times the root of their number.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        covariance: Covariance,
        scaled: Calibrated,
        likelihood: Likelihood | None,
        doubts: tuple[str, ...] = (),
        calibrated_on: int = 0,
        *,
        forward: Forward | None = None,
        select: Select | None = None,
    ) -> None:
        self.model = model
        self.head = head
        self.covariance = covariance
        self.alpha = scaled.alpha
        self.ridge = scaled.ridge
        self.likelihood = likelihood
        self.doubts = doubts
        self.calibrated_on = calibrated_on
        self._options: dict[str, Any] = {"forward": forward, "select": select}
        self._root = covariance.root(scaled.ridge)
        self._seen: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        alpha = ", ".join(f"{float(a):.3g}" for a in self.alpha.unique()[:3])
        kind = "unknown" if self.likelihood is None else self.likelihood.name
        text = (
            f"Uncertainties of {self.head.name!r} ({kind}): alpha {alpha}"
            f"{' and others' if len(self.alpha.unique()) > 3 else ''}, ridge {self.ridge:.3g}, "
            f"{self.covariance.count} features of width {self.covariance.width}, calibrated on "
            f"{self.calibrated_on}"
        )
        return "; ".join([text, *(f"doubt: {doubt}" for doubt in self.doubts)])

    def __call__(self, inputs: Any) -> Prediction:
        """What the network predicts, with variances, in one forward pass.

        The network is evaluated in eval mode, without gradients and eagerly; its modes and random
        streams are put back.

        Args:
            inputs: as in `nettrace.Probe`; moved to the network's device.

        Raises:
            ValueError: if weights or buffers are others than at the fit, or outputs are not finite.
        """
        layer, factors = self._look(inputs)
        return self._prediction(layer, factors)

    def sample(self, inputs: Any, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, N, ...) the outputs of so many last layers, drawn about the network's own.

        The weights of output c are normal with covariance alpha_c^2 (F^T F + ridge^2 1)^-1. A
        member is one network: its outputs for all samples go together.

        Args:
            inputs: as in `nettrace.Probe`.
            count: how many members.
            generator: of the random numbers, on the CPU; by default one of its own, which gives the
                same members each time.

        Raises:
            ValueError: as a call does, or if the count is below 1.
        """
        if count < 1:
            raise ValueError(f"expected a count of at least 1, got {count}")
        layer, factors = self._look(inputs)
        drawing = own_generator(0, "uncertainty.sample") if generator is None else generator
        shape = (count, self.head.outputs, factors.shape[-1])
        draws = torch.randn(shape, generator=drawing, dtype=torch.float64, device=drawing.device)
        draws = draws.to(factors.device) * self.alpha.to(factors.device)[:, None]
        off = torch.einsum("...d,kcd->k...c", factors, draws)
        mean = layer.outputs.detach()
        found = [
            mean + layer.as_outputs(one).to(mean.device, _at_least_single(mean)) for one in off
        ]
        return torch.stack(found)

    def propagate(self, inputs: Any, function: Callable[[Tensor], Tensor]) -> Derived:
        """A quantity made of the outputs, and its variance, to first order.

        Outputs of one network err together: their covariance between samples and positions is that
        of their features, alpha_c^2 f^T (F^T F + ridge^2 1)^-1 f', so that the variance of a sum is
        not the sum of variances, and that of a difference of like samples is small.

        Args:
            inputs: as in `nettrace.Probe`.
            function: from outputs (N, ...), at least in float32, to a tensor of any shape, by
                differentiable operations.

        Raises:
            ValueError: as a call does, or if the quantity does not depend on the outputs by
                differentiable operations.
        """
        layer, factors = self._look(inputs)
        with torch.inference_mode(False), torch.enable_grad():
            outputs = layer.outputs.detach().to(_at_least_single(layer.outputs)).clone()
            outputs.requires_grad_()
            value = function(outputs)
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise ValueError(
                    "expected function= to give a tensor that depends on the outputs by "
                    f"differentiable operations, got {type(value).__name__}"
                    f"{' without a gradient' if isinstance(value, Tensor) else ''}"
                )
            alphas = self.alpha.to(factors.device)[:, None]
            found = []
            for one in value.flatten():
                (slope,) = torch.autograd.grad(one, outputs, retain_graph=True)
                slopes = layer.by_position(slope).to(factors)
                # One vector an output: pairs of samples need not be formed.
                by_output = slopes.flatten(0, -2).T @ factors.flatten(0, -2)
                found.append((alphas * by_output).square().sum())
        variance = torch.stack(found) if found else value.new_zeros(0)
        return Derived(value.detach(), variance.reshape(value.shape).to(value))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts that `load` makes the same of, without the network."""
        kind = self.likelihood
        functions = [name for name, value in self._options.items() if callable(value)]
        select = self._options["select"]
        return {
            "format": _FORMAT,
            "head": asdict(self.head),
            "covariance": self.covariance.sums.cpu(),
            "count": self.covariance.count,
            "alpha": self.alpha.cpu(),
            "ridge": float(self.ridge),
            "likelihood": None if kind is None else kind.name,
            "class_axis": kind.axis if isinstance(kind, Categorical) else None,
            "doubts": list(self.doubts),
            "calibrated_on": self.calibrated_on,
            "functions": functions,
            "select": None if callable(select) else select,
        }

    def save(self, path: str | Path) -> None:
        """Writes them to a file, which `torch.load(weights_only=True)` and `load` read."""
        torch.save(self.state_dict(), path)

    def _look(self, inputs: Any) -> tuple[LastLayer, Tensor]:
        """The last layer, and (N, ..., D) features f^T R, of which squares sum to u."""
        device = next(self.model.parameters(), torch.empty(0)).device
        probe = Probe(inputs, **self._options).to(device)
        with evaluating(self.model):
            self._check_same()
            layer = last_layer(self.model, probe, self.head.named)
            features = wide(with_ones(layer))
            if self._root.device != features.device:
                self._root = self._root.to(features.device)
            factors = features @ self._root
        if not bool(factors.isfinite().all() & layer.outputs.isfinite().all()):
            flat = factors.flatten(1).sum(1) + wide(layer.outputs).flatten(1).sum(1)
            wrong = (~flat.isfinite()).nonzero().flatten().tolist()
            raise ValueError(
                f"features or outputs of samples {wrong[:5]} are not finite: there is NaN or "
                "infinity in the inputs, or in the network"
            )
        return layer, factors

    def _prediction(self, layer: LastLayer, factors: Tensor) -> Prediction:
        mean = layer.outputs.detach()
        u = factors.square().sum(-1)
        squares = self.alpha.to(u.device).square()
        number = _at_least_single(mean)
        variance = layer.as_outputs((u[..., None] * squares).to(mean.device, number))
        found = None
        if isinstance(self.likelihood, Categorical):
            found = probit(mean.to(number), variance).softmax(self.likelihood.axis)
        return Prediction(mean, variance, found)

    def _check_same(self) -> None:
        # A digest takes long: again only where something was written.
        state = _state(self.model)
        seen = tuple(n for w in state for n in (w.data_ptr(), _version(w)))
        if seen != self._seen:
            if digest_of(state).hexdigest() != self.head.digest:
                raise ValueError(
                    "the network's weights or buffers are not those that these uncertainties were "
                    "fitted to: fit them again, or load the network that they are of"
                )
            self._seen = seen


def load(
    path: str | Path | dict[str, Any],
    model: nn.Module,
    *,
    forward: Forward | None = None,
    select: Select | None = None,
) -> Uncertainties:
    """Uncertainties that were saved, of the same network.

    That it is the same, in all parameters and buffers, is seen at the first call, and again
    whenever one of them was written to; what is written to their `.data` meanwhile is not seen.

    Args:
        path: the file, or what `Uncertainties.state_dict` gave.
        model: the network.
        forward: that of the fit, which is not saved.
        select: likewise, where it was a function.

    Raises:
        ValueError: if it is no such file, or was fitted with functions that are not given.
    """
    if isinstance(path, dict):
        state: Any = path
    else:
        state = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(
            f"expected uncertainties that Uncertainties.save wrote, in format {_FORMAT}, got "
            f"{state.get('format') if isinstance(state, dict) else type(state).__name__!r}"
        )
    given = {"forward": forward, "select": select}
    if missing := [name for name in state["functions"] if given[name] is None]:
        raise ValueError(
            f"these uncertainties were fitted with {missing[0]}=, a function, which is not saved: "
            f"pass load(..., {missing[0]}=...) too"
        )
    kinds: dict[str | None, Likelihood | None] = {None: None, "gaussian": Gaussian()}
    if state["likelihood"] == "categorical":
        kinds["categorical"] = Categorical(state["class_axis"])
    return Uncertainties(
        plain_model(model),
        Head(**state["head"]),
        Covariance(state["covariance"], state["count"]),
        Calibrated(state["ridge"], state["alpha"]),
        kinds[state["likelihood"]],
        tuple(state["doubts"]),
        state["calibrated_on"],
        forward=forward,
        select=state["select"] if select is None else select,
    )


def _at_least_single(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _state(model: nn.Module) -> list[Tensor]:
    """What predictions depend on."""
    return [t.detach() for t in (*model.parameters(), *model.buffers())]


def _version(values: Tensor) -> int:
    return 0 if values.is_inference() else values._version
