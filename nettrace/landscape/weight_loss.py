"""The mean loss of a network as a function of its weights, for many copies of them at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nettrace.freeze import random_streams
from nettrace.likelihood import Categorical
from nettrace.probe import Probe
from nettrace.second_order import Flattening
from nettrace.smooth import called, widened, widened_state

#: Up to which relative difference gradients of copies taken together and apart agree.
_AGREE = {torch.float32: 1e-3, torch.float64: 1e-7}


class WeightLoss(Flattening):
    """The mean loss on a probe, in nats a sample, with any weights in place of the network's own.

    Copies are evaluated together by `torch.func.vmap`, as many as memory allows, or one after the
    other where that cannot be done or gives other gradients than plain autograd does. The network
    is in the mode that it is in, draws the same random numbers at each evaluation, and is to be
    frozen meanwhile (`nettrace.freeze.frozen`).

    Args:
        model: the network.
        probe: the samples.
        parameters: names or patterns of those that vary, such as "layers.1.*"; others stay as
            they are. None for all that has a place in a state: frozen parameters and buffers too.
        memory: bytes that copies may take together.

    Attributes:
        point: (P,) the network's own weights.
        samples: N, of the probe.
        apart: for "losses", "gradients", both "of rows", and "samples", why copies are evaluated
            one after the other, or None where together; found when they are first asked for.

    Raises:
        ValueError: if the loss is not known or not finite at the network's own weights, or there is
            no such parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        parameters: str | Sequence[str] | None = "*",
        memory: int = 2**30,
    ) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(
                f"expected probe= to be a nettrace.Probe, got {type(probe).__name__}: "
                "nettrace.Probe(inputs, targets)"
            )
        self._model = model
        self._probe = probe.map(widened(torch.float32))
        self._state = widened_state(model, torch.float32)
        names = numbers(self._state) if parameters is None else matching(model, parameters)
        super().__init__({name: self._state[name] for name in names})
        self._buffers = {name for name, _ in model.named_buffers()}
        self.point = self.flat(self._state)
        self.samples = len(probe)
        self.apart: dict[str, str | None] = {}
        self._same_draws = random_streams({t.device for t in self._state.values()})
        self._at_once = max(1, memory // self._bytes_of_one())
        # What the loss is does not depend on which rows are looked at.
        outputs = self._outputs(self._probe, _leaf(self.point)).detach()
        self._probe.likelihood = self._probe.distribution(outputs)

    def __call__(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """The mean losses (K,) in float64 with weights (K, P).

        Args:
            weights: of each copy.
            rows: (K, B) which samples each copy sees; None for all.
        """
        return torch.cat([self._losses(*part) for part in self._parts(weights, rows)])

    def gradients(self, weights: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean losses (K,) in float64 and their gradients (K, P); arguments as for a call."""
        found = [self._gradients(*part) for part in self._parts(weights, rows)]
        losses, gradients = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def samples_of(self, weights: Tensor) -> Tensor:
        """(K, R, N) in float64: what each sample makes of weights (K, P).

        Row 0 are the losses. Where the outputs are logits of classes there is a row 1: the share
        of a sample's positions at which another class than the target's has the largest; NaN where
        the loss is.
        """
        return torch.cat([self._samples_of(part) for part, _ in self._parts(weights, None)])

    def _samples_of(self, weights: Tensor) -> Tensor:
        def apart() -> Tensor:
            return torch.stack([self._rows(_leaf(w)).detach() for w in weights])

        def together() -> Tensor:
            return vmap(self._rows, randomness="same")(weights).detach()

        # Which of two equal logits is the largest may depend on rounding.
        return self._found("samples", together, apart, lambda rows: rows[:, :1])

    def _parts(
        self, weights: Tensor, rows: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        for begin in range(0, len(weights), self._at_once):
            part = slice(begin, begin + self._at_once)
            yield weights[part], None if rows is None else rows[part]

    def _losses(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        each = _each(rows, len(weights))

        def apart() -> Tensor:
            return torch.stack(
                [self._mean(_leaf(w), r).detach() for w, r in zip(weights, each, strict=True)]
            )

        def together() -> Tensor:
            if rows is not None:
                return self._means_of(weights.detach(), rows).detach()
            return vmap(self._mean, (0, None), randomness="same")(weights, rows).detach()

        return self._found("losses" if rows is None else "losses of rows", together, apart)

    def _gradients(self, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        each = _each(rows, len(weights))

        def apart() -> Tensor:
            return torch.stack([self._gradient(w, r) for w, r in zip(weights, each, strict=True)])

        def together() -> Tensor:
            if rows is not None:
                leaf = _leaf(weights)
                losses = self._means_of(leaf, rows)
                gradients = _derivative(losses.sum(), leaf)
                return torch.cat([losses.detach()[:, None], gradients.double()], 1)
            each = grad_and_value(self._mean)
            gradients, losses = vmap(each, (0, None), randomness="same")(weights, rows)
            return torch.cat([losses[:, None], gradients.double()], 1)

        what = "gradients" if rows is None else "gradients of rows"
        found = self._found(what, together, apart)
        return found[:, 0], found[:, 1:].to(weights)

    def _found(
        self,
        what: str,
        together: Callable[[], Tensor],
        apart: Callable[[], Tensor],
        compared: Callable[[Tensor], Tensor] = lambda found: found,
    ) -> Tensor:
        """What copies give together, or one by one where that fails or is not the same."""
        if self.apart.get(what) is not None:
            return apart()
        if what in self.apart:
            return together()
        truth = apart()
        try:
            with warnings.catch_warnings():
                # Copies of what has no batching rule are still taken together but for that.
                warnings.filterwarnings("ignore", "There is a performance drop")
                found = together()
        except Exception as error:  # whatever vmap or the network makes of it
            self.apart[what] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return truth
        self.apart[what] = None
        one, other = compared(found), compared(truth)
        off = float((one - other).norm() / (other.norm() + 1e-6))
        if not off < _AGREE.get(self.dtype, 1e-3) and bool(other.isfinite().all()):
            self.apart[what] = f"together, {what} differ by {off:.2g} of their size"
        return truth

    def _gradient(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        """(1 + P,) the loss and its gradient, with float64 for the loss."""
        leaf = _leaf(weights)
        loss = self._mean(leaf, rows)
        return torch.cat([loss.detach()[None], _derivative(loss, leaf).double()])

    def _mean(self, weights: Tensor, rows: Tensor | None) -> Tensor:
        probe = self._probe if rows is None else self._taken(rows)
        return self._losses_of(probe, self._outputs(probe, weights)).mean()

    def _means_of(self, weights: Tensor, rows: Tensor) -> Tensor:
        """The mean losses (K,) of each copy on rows (K, B); only networks see copies one by one.

        Losses may look at the values of targets, which `vmap` does not let them do.
        """

        def each(weights: Tensor, rows: Tensor) -> Tensor:
            return self._outputs(self._taken(rows), weights)

        outputs = vmap(each, randomness="same")(weights, rows).flatten(0, 1)
        return self._losses_of(self._taken(rows.flatten()), outputs).view(len(rows), -1).mean(1)

    def _taken(self, rows: Tensor) -> Probe:
        taken = self._probe.take(rows)
        if taken is None:
            raise ValueError(
                "the probe cannot be taken in parts, as not all tensors of its inputs have one row "
                "a sample: leave out batch_size="
            )
        return taken

    def _rows(self, weights: Tensor) -> Tensor:
        """(R, N) what `samples_of` says, of one copy."""
        outputs = self._outputs(self._probe, weights)
        losses = self._losses_of(self._probe, outputs)
        likelihood = self._probe.distribution(outputs)
        if not isinstance(likelihood, Categorical):
            return losses[None]
        classes = outputs.argmax(likelihood.axis)
        wrong = (classes != self._probe.targets).reshape(len(losses), -1).to(losses).mean(1)
        return torch.stack([losses, wrong.masked_fill(losses.isnan(), torch.nan)])

    def _outputs(self, probe: Probe, weights: Tensor) -> Tensor:
        self._same_draws()
        parts = self.split(weights)
        for name in self._buffers & parts.keys():  # of which batch normalisation has no gradient
            parts[name] = parts[name].detach()
        with plain_attention():
            return called(self._model, {**self._state, **parts}, probe.look)

    def _losses_of(self, probe: Probe, outputs: Tensor) -> Tensor:
        losses = probe.per_sample_losses(outputs)
        if losses is None:
            raise ValueError(
                "the probe says not what the loss is: give it targets, and likelihood= or losses= "
                "where these do not tell"
            )
        return losses.to(torch.float64)

    def _bytes_of_one(self) -> int:
        """What one copy takes, with what its tape keeps."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaf = _leaf(self.point)
        try:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                loss = self._mean(leaf, None)
        except RuntimeError:  # of what does not go with hooks, such as torch.func in the forward
            loss = self._mean(leaf, None)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the mean loss at the network's own weights is {float(loss.detach())}: a "
                "landscape is probed around finite ones"
            )
        return sum(kept.values()) + 4 * self.point.numel() * self.point.element_size()


def _leaf(weights: Tensor) -> Tensor:
    """By which networks that do so in their forward may differentiate."""
    return weights.detach().requires_grad_()


def _each(rows: Tensor | None, copies: int) -> Sequence[Tensor | None]:
    return [None] * copies if rows is None else list(rows)


def _derivative(loss: Tensor, leaf: Tensor) -> Tensor:
    """Zero where the loss does not depend on the weights."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(loss, leaf, materialize_grads=True)[0]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Lets attention be made of products of matrices alone."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def numbers(state: Mapping[str, Tensor]) -> list[str]:
    """The names of what is made of real or complex numbers, not of integers."""
    return [name for name, t in state.items() if t.is_floating_point() or t.is_complex()]


def matching(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The names of parameters that need a gradient and match a pattern.

    Raises:
        ValueError: if there are none.
    """
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = [name for name in names if any(fnmatchcase(name, one) for one in several)]
    if not found:
        raise ValueError(
            f"no parameter that needs a gradient matches {several}: there are {names or 'none'}"
        )
    return found
