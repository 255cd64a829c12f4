"""Which samples a network is looked at on, and how to get outputs and per-sample losses from it."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from nettrace.batch import Select, digest_of, joined, mapped, named, selected, split, tensors
from nettrace.inference import LikelihoodName, check_likelihood, infer
from nettrace.likelihood import Likelihood

Forward: TypeAlias = Callable[[nn.Module, Any], Tensor]
Losses: TypeAlias = Callable[[Tensor, Any], Tensor]


class Probe:
    """Fixed samples on which a network is measured.

    Args:
        inputs: what the network is called with: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments; axis 0 of its tensors counts the samples. A mapping of one
            entry, under a name that the network does not know, is passed by position.
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
        select: which of what the network returns to look at: the name or number of a tensor in a
            mapping, dataclass or tuple; "last", the last token of (N, T, V), wherever padding is
            not on that side; or a function from what is returned to (N, ...). By default a tensor
            itself, "logits", or the only floating tensor there is; records say which was taken.
        layers: of which layers to look at what they make of the samples, as in
            `nettrace.activations`, where measures ask for that.

    Attributes:
        cut: how many samples are those of the first of two probes that were joined, else None.

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
        select: Select | None = None,
        layers: str | Sequence[str] | None = None,
    ) -> None:
        check_likelihood(likelihood)
        if select is not None and not (isinstance(select, (str, int)) or callable(select)):
            raise TypeError(
                f"expected select= to be 'last', a name, a number or a function, got {select!r}"
            )
        names = [layers] if isinstance(layers, str) or layers is None else layers
        if not isinstance(names, Sequence) or not all(
            isinstance(n, (str, type(None))) for n in names
        ):
            raise TypeError(
                f"expected layers= to be a name, a pattern, or a list of these, got {layers!r}"
            )
        first = next(tensors(inputs), None)
        if first is None and inputs is not None and not isinstance(inputs, Mapping):
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
        if targets is not None and losses is None and next(tensors(targets), None) is None:
            raise TypeError(
                f"expected targets to be a tensor, got {type(targets).__name__}: convert arrays "
                "and lists by torch.as_tensor, or pass losses= for targets of another kind"
            )
        for target in tensors(targets):
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
        self.select = select
        self.layers = layers
        self.cut: int | None = None

    def __repr__(self) -> str:
        kinds = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors(self.inputs)]
        return f"Probe of {len(self)} samples: {', '.join(kinds)}"

    def __len__(self) -> int:
        return len(next(tensors(self.inputs)))

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,  # type: ignore[type-arg]  # which jsonargparse would take literally
        samples: int = 64,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        forward: Forward | None = None,
        losses: Losses | None = None,
        likelihood: LikelihoodName | Likelihood | None = None,
        class_axis: int | None = None,
        select: Select | None = None,
    ) -> Probe:
        """A probe of evenly spaced samples of a map-style data set.

        Args:
            dataset: has a length and gives samples by number; a sample is an (input, target) pair,
                or an input alone.
            samples: how many to take, at most; all if there are fewer.
            collate: joins samples to a batch; by default as `torch.utils.data.DataLoader` does.
            forward: this and what follows as in `Probe`.
            losses: likewise.
            likelihood: likewise.
            class_axis: likewise.
            select: likewise.

        Raises:
            TypeError: if the data set has no length.
            ValueError: if it is empty.
        """
        return cls.from_batch(
            evenly_spaced(dataset, samples, collate),
            forward=forward,
            losses=losses,
            likelihood=likelihood,
            class_axis=class_axis,
            select=select,
        )

    @classmethod
    def from_batch(cls, batch: Any, **options: Any) -> Probe:
        """A probe from a batch as loaders give it: inputs alone, or with targets.

        Args:
            batch: a pair of inputs and targets; a mapping, dataclass or named tuple, of which
                "labels", "label", "targets", "target" or "y" are the targets, and the rest are
                inputs by name; or inputs alone.
            options: further arguments of `Probe`.
        """
        return cls(*split(batch), **options)

    def map(self, function: Callable[[Tensor], Tensor]) -> Probe:
        """The same probe with a function applied to its tensors."""
        twin = copy.copy(self)
        twin.inputs, twin.targets = mapped(self.inputs, function), mapped(self.targets, function)
        return twin

    def at(self, layers: str | Sequence[str]) -> Probe:
        """The same probe, with other layers to look at."""
        twin = copy.copy(self)
        twin.layers = layers
        return twin

    def to(self, device: torch.device | str) -> Probe:
        """The same probe on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def fingerprint(self) -> str:
        """A digest of the samples' values, types and shapes."""
        digest = digest_of([*tensors(self.inputs), *tensors(self.targets)])
        if self.select is not None:
            digest.update(str(getattr(self.select, "__qualname__", self.select)).encode())
        return digest.hexdigest()[:16]

    def look(self, model: nn.Module) -> Tensor:
        """The network's outputs (N, ...) on the samples, with their tape.

        Raises:
            ValueError: if the probe and the model are on different devices, or shapes do not fit.
            TypeError: if the network returns no tensor, or it is not clear which is meant.
        """
        return self.see(model)[0]

    def see(self, model: nn.Module) -> tuple[Tensor, str]:
        """The outputs as `look` gives them, and which they are where the network returns more."""
        self._check_device(model)
        outputs, name = self._outputs(model)
        if outputs.dim() == 0 or (self.forward is None and len(outputs) != len(self)):
            raise ValueError(
                f"expected outputs of shape ({len(self)}, ...), one row a sample, got shape "
                f"{tuple(outputs.shape)}"
            )
        return outputs, name

    def take(self, samples: Tensor | slice) -> Probe | None:
        """The probe of some of its samples, by number, in the order given; a slice is not copied.

        Returns:
            None where the samples cannot be told apart.
        """
        untold = self.targets is not None and next(tensors(self.targets), None) is None
        if untold or not self._has_rows(self.inputs, self.targets):
            return None
        part = self.map(
            lambda t: t[samples.to(t.device) if isinstance(samples, Tensor) else samples]
        )
        part.cut = None
        return part

    def joined(self, other: Probe) -> Probe:
        """This probe's inputs and then another's as one probe, which knows where it was cut.

        It has no targets, since those of the two need not be of one kind.

        Raises:
            ValueError: if the inputs do not fit in one batch, or outputs are computed differently.
        """
        for name in ("forward", "select", "layers"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"the probes cannot be joined, they differ in {name}=: pass the same to both"
                )
        if not self._has_rows(self.inputs) or not other._has_rows(other.inputs):
            raise ValueError(
                "the probes cannot be joined: not all tensors of their inputs have one row a sample"
            )
        both = Probe(
            joined(self.inputs, other.inputs),
            forward=self.forward,
            select=self.select,
            layers=self.layers,
        )
        both.cut = len(self)
        return both

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

    def own_loss(self, model: nn.Module) -> Tensor | None:
        """The loss () that the network itself returns, given the targets as `labels=`.

        Returns:
            None where its forward takes no `labels`, or it returns no loss.
        """
        inputs = self.inputs
        takes_them = "labels" in _parameters(model) and isinstance(inputs, Mapping)
        if self.forward is not None or not takes_them or not isinstance(self.targets, Tensor):
            return None
        with torch.no_grad():
            found = named(model(**{**inputs, "labels": self.targets})) or {}
        loss = found.get("loss")
        return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None

    def _has_rows(self, *trees: Any) -> bool:
        """Whether each tensor has one row a sample."""
        return all(t.dim() > 0 and len(t) == len(self) for t in tensors(trees))

    def _outputs(self, model: nn.Module) -> tuple[Tensor, str]:
        hint = "pass Probe(..., forward=lambda model, inputs: ...) to compute the outputs"
        try:
            found = self._call(model)
        except NotImplementedError as error:
            raise TypeError(f"{type(model).__name__} has no forward of its own: {hint}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if self.forward is not None:
                raise
            raise TypeError(
                f"{type(model).__name__} cannot be called with the probe's inputs, a "
                f"{type(self.inputs).__name__} ({type(error).__name__}: {error}): {hint}"
            ) from error
        except RuntimeError as error:
            own, theirs = _number_types(tensors(self.inputs)), _number_types(model.parameters())
            if type(error) is not RuntimeError or not theirs or own <= theirs:
                raise
            expected = " or ".join(sorted(map(str, theirs)))
            raise TypeError(
                f"{type(model).__name__} has weights of {expected}, the probe inputs of "
                f"{', '.join(sorted(map(str, own)))} ({error}): give inputs of {expected}; weights "
                "from a checkpoint keep the type in which they were saved"
            ) from error
        try:
            return selected(found, self.select)
        except ValueError as error:
            raise TypeError(
                f"expected {type(model).__name__} to return a tensor of shape (N, ...), but "
                f"{error}: choose by Probe(..., select=...), or {hint}"
            ) from error

    def _call(self, model: nn.Module) -> Any:
        inputs = self.inputs
        if self.forward is not None:
            return self.forward(model, inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        if not isinstance(inputs, Mapping):
            return model(inputs)
        taken = _parameters(model)
        anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        if len(inputs) == 1 and not anything and not inputs.keys() & taken.keys():
            return model(*inputs.values())
        return model(**inputs)

    def _check_device(self, model: nn.Module) -> None:
        places = {p.device for p in model.parameters()}
        own = {t.device for t in tensors(self.inputs)}
        if len(places) == 1 and not own <= places:
            device = places.pop()
            raise ValueError(
                f"the probe is on {', '.join(sorted(map(str, own)))} but the model on {device}: "
                f"call probe.to({str(device)!r})"
            )


def _number_types(found: Iterable[Tensor]) -> set[torch.dtype]:
    return {one.dtype for one in found if one.is_floating_point()}


def evenly_spaced(
    dataset: Any, samples: int, collate: Callable[[list[Any]], Any] | None = None
) -> Any:
    """A batch of evenly spaced samples; see `Probe.from_dataset`."""
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
    return (collate or default_collate)(chosen)


def fingerprint(probe: Probe | Mapping[str, Probe]) -> str:
    """A digest of a probe, or of several and their names."""
    if isinstance(probe, Probe):
        return probe.fingerprint()
    text = "\n".join(f"{name} {one.fingerprint()}" for name, one in probe.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_probes(probe: object) -> None:
    """Checks that it is a probe, or a mapping of names to probes.

    Raises:
        TypeError: if it is not.
        ValueError: if there are none, or a name is empty or has a slash.
    """
    several = isinstance(probe, Mapping)
    for one in probe.values() if isinstance(probe, Mapping) else [probe]:
        if not isinstance(one, Probe):
            raise TypeError(
                f"expected a nettrace.Probe{', each,' if several else ''} got "
                f"{type(one).__name__}: wrap samples as Probe(inputs, targets)"
            )
    if isinstance(probe, Mapping):
        if not probe:
            raise ValueError("expected one probe or more, got an empty mapping")
        for name in probe:
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"expected probes' names to be texts without '/', got {name!r}")


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a network's forward takes, by name; nothing where that cannot be told."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
