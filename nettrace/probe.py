"""Which samples a network is looked at on, and how to get outputs and per-sample losses from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from nettrace.inference import LikelihoodName, check_likelihood, infer
from nettrace.likelihood import Likelihood

Forward: TypeAlias = Callable[[nn.Module, Any], Tensor]
Losses: TypeAlias = Callable[[Tensor, Any], Tensor]


class Probe:
    """Fixed samples on which a network is measured.

    Args:
        inputs: what the network is called with: a tensor, a tuple of positional arguments or a dict
            of keyword arguments; axis 0 of its tensors counts the samples.
        targets: what the outputs are compared with, if anything.
        forward: `forward(model, inputs) -> outputs`, of shape (N, ...). By default the model is
            called.
        losses: `losses(outputs, targets) -> losses`, of shape (N,). By default the negative log
            likelihood.
        likelihood: the distribution whose parameters the outputs are, which also defines the Fisher
            information: "categorical" for logits of classes (cross-entropy in nats, summed over
            positions), "gaussian" for means at unit variance (half the squared error, summed over
            outputs), "bernoulli" for logits of independent labels, "poisson" for logarithms of
            rates, or an object such as `nettrace.Gaussian(covariance=4.0)`. By default, where
            `losses` is not given, integer targets mean the first and floating targets of the
            outputs' shape the second.
        class_axis: the axis of the outputs along which the classes run. By default 1 or the last,
            whichever fits the targets.

    Raises:
        ValueError: if there are no samples, or not as many targets, or no such likelihood.

    Example:
        >>> import torch, nettrace as nt
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> len(probe)
        8
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        forward: Forward | None = None,
        losses: Losses | None = None,
        likelihood: LikelihoodName | Likelihood | None = None,
        class_axis: int | None = None,
    ) -> None:
        check_likelihood(likelihood)
        first = next(_tensors(inputs), None)
        if first is None and inputs is not None and inputs != {}:
            raise TypeError(
                f"expected inputs to be a tensor, or a tuple or dict of tensors, got "
                f"{type(inputs).__name__}: convert arrays by torch.as_tensor, and take samples of "
                "a data set by Probe.from_dataset"
            )
        if first is None or first.dim() == 0 or len(first) == 0:
            found = "no tensor" if first is None else f"shape {tuple(first.shape)}"
            raise ValueError(
                f"the probe is empty: expected inputs with a sample or more on axis 0, got {found}"
            )
        for target in _tensors(targets):
            if forward is None and target.dim() > 0 and len(target) != len(first):
                raise ValueError(
                    f"expected as many targets as inputs, got {len(target)} targets and "
                    f"{len(first)} inputs"
                )
        self.inputs = inputs
        self.targets = targets
        self.forward = forward
        self.losses = losses
        self.likelihood = likelihood
        self.class_axis = class_axis

    def __repr__(self) -> str:
        kinds = [
            f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in _tensors(self.inputs)
        ]
        return f"Probe of {len(self)} samples: {', '.join(kinds)}"

    def __len__(self) -> int:
        return len(next(_tensors(self.inputs)))

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        samples: int = 64,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> Probe:
        """A probe of evenly spaced samples of a map-style data set.

        Args:
            dataset: has a length and gives samples by number; a sample is an (input, target) pair,
                or an input alone.
            samples: how many to take, at most; all if there are fewer.
            collate: joins samples to a batch; by default as `torch.utils.data.DataLoader` does.
            options: further arguments of `Probe`.

        Raises:
            TypeError: if the data set has no length.
            ValueError: if it is empty.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"cannot take samples by number from {type(dataset).__name__}, which is read as a "
                "stream: pass probe=nettrace.Probe(inputs, targets) with samples of your own"
            )
        total = len(dataset)
        count = min(samples, total)
        if count < 1:
            raise ValueError(
                f"the probe is empty: the data set has {total} samples, of which {samples} were "
                "asked for"
            )
        chosen = [dataset[i * total // count] for i in range(count)]
        return cls.from_batch((collate or default_collate)(chosen), **options)

    @classmethod
    def from_batch(cls, batch: Any, **options: Any) -> Probe:
        """A probe from a batch: an (inputs, targets) pair, or inputs alone.

        Args:
            batch: a pair, or inputs alone.
            options: further arguments of `Probe`.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return cls(batch[0], batch[1], **options)
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return cls(batch[0], **options)
        return cls(batch, **options)

    def map(self, function: Callable[[Tensor], Tensor]) -> Probe:
        """The same probe with a function applied to its tensors."""
        return Probe(
            _map(self.inputs, function),
            _map(self.targets, function),
            forward=self.forward,
            losses=self.losses,
            likelihood=self.likelihood,
            class_axis=self.class_axis,
        )

    def to(self, device: torch.device | str) -> Probe:
        """The same probe on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def fingerprint(self) -> str:
        """A digest of the samples' values, types and shapes."""
        digest = hashlib.sha256()
        for tensor in [*_tensors(self.inputs), *_tensors(self.targets)]:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def look(self, model: nn.Module) -> Tensor:
        """The network's outputs (N, ...) on the samples, with their tape.

        Raises:
            ValueError: if the probe and the model are on different devices, or shapes do not fit.
            TypeError: if the network returns something else than a tensor.
        """
        self._check_device(model)
        outputs = self._call(model, self.inputs)
        if outputs.dim() == 0 or (self.forward is None and len(outputs) != len(self)):
            raise ValueError(
                f"expected outputs of shape ({len(self)}, ...), one row a sample, got shape "
                f"{tuple(outputs.shape)}"
            )
        return outputs

    def take(self, samples: Tensor) -> Probe | None:
        """The probe of some of its samples, by number, in the order given.

        Returns:
            None where the samples cannot be told apart.
        """
        tensors = [*_tensors(self.inputs), *_tensors(self.targets)]
        if any(t.dim() == 0 or len(t) != len(self) for t in tensors):
            return None
        return self.map(lambda t: t[samples.to(t.device)])

    def distribution(self, outputs: Tensor) -> Likelihood | None:
        """The distribution that the outputs parametrise, if it is known.

        Raises:
            ValueError: if the one that was named does not fit the outputs and targets.
        """
        if self.losses is not None and self.likelihood is None:
            return None
        return infer(outputs, self.targets, self.likelihood, self.class_axis)

    def per_sample_losses(self, outputs: Tensor) -> Tensor | None:
        """The loss (N,) of each sample, with its tape, if it is known.

        Raises:
            ValueError: if the targets are out of range, or the losses not of shape (N,).
        """
        if self.losses is None:
            likelihood = self.distribution(outputs)
            if likelihood is None or not isinstance(self.targets, Tensor):
                return None
            return likelihood.losses(outputs, self.targets)
        losses = self.losses(outputs, self.targets)
        if losses.shape != (len(outputs),):
            raise ValueError(
                f"expected losses of shape ({len(outputs)},), one a sample, got "
                f"{tuple(losses.shape)}: use reduction='none' and sum over any other axes"
            )
        return losses

    def _call(self, model: nn.Module, inputs: Any) -> Tensor:
        hint = "pass Probe(..., forward=lambda model, inputs: ...) to compute the outputs"
        try:
            if self.forward is not None:
                outputs = self.forward(model, inputs)
            elif isinstance(inputs, (tuple, list)):
                outputs = model(*inputs)
            elif isinstance(inputs, dict):
                outputs = model(**inputs)
            else:
                outputs = model(inputs)
        except NotImplementedError as error:
            raise TypeError(f"{type(model).__name__} has no forward of its own: {hint}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if self.forward is not None:
                raise
            raise TypeError(
                f"{type(model).__name__} cannot be called with the probe's inputs, a "
                f"{type(inputs).__name__} ({type(error).__name__}: {error}): {hint}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"expected {type(model).__name__} to return a tensor of shape (N, ...), got "
                f"{type(outputs).__name__}: {hint}"
            )
        return outputs

    def _check_device(self, model: nn.Module) -> None:
        places = {p.device for p in model.parameters()}
        own = {t.device for t in _tensors(self.inputs)}
        if len(places) == 1 and not own <= places:
            device = places.pop()
            raise ValueError(
                f"the probe is on {', '.join(sorted(map(str, own)))} but the model on {device}: "
                f"call probe.to({str(device)!r})"
            )


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([_map(value, function) for value in tree])
    return tree
