"""The last linear map of a network, with what goes into it: found, and held against the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nettrace.linear_maps import LinearMap, LinearMaps, Step
from nettrace.probe import Probe
from nettrace.unwrapped import plain_model


class NoLastLayerError(ValueError):
    """The outputs are not those of a linear map; the message says what stands behind the last."""


@dataclass(frozen=True)
class LastLayer:
    """A network's head on some samples: outputs = features @ weight.T + bias.

    Args:
        name: of the module, or of the parameter where there is no module.
        weight: (C, d).
        bias: (C,), None if there is none.
        features: (N, ..., d) what goes into it, at each position of a sample, as of tokens.
        outputs: (N, ...) as the network, or the head that was named, returns them.
        order: (Q C,) where each of a sample's outputs, by position and then output, stands among
            them; None where they stand so.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    features: Tensor
    outputs: Tensor
    order: Tensor | None = None

    def by_position(self, values: Tensor) -> Tensor:
        """(N, ..., C) what has the shape of the outputs, by position and then output."""
        flat = values.reshape(len(values), -1)
        flat = flat if self.order is None else flat[:, self.order]
        return flat.reshape(*self.features.shape[:-1], len(self.weight))

    def as_outputs(self, values: Tensor) -> Tensor:
        """What is given by position and then output (N, ..., C), in the shape of the outputs."""
        flat = values.reshape(len(values), -1)
        flat = flat if self.order is None else flat[:, self.order.argsort()]
        return flat.reshape(self.outputs.shape)


def last_layer(model: nn.Module, probe: Probe, head: str | None = None) -> LastLayer:
    """The head of a network, with its features and outputs on a probe, by one forward pass.

    The last linear map whose result is the network's output, but for reshapes, selections and
    casts: of a module (`nn.Linear`, those derived from it, convolutions of size 1) or of a function
    (`F.linear(h, w)`, `h @ w + b`, `torch.addmm`), of weights that depend on parameters alone. That
    outputs are features @ weight.T + bias, to rounding, is checked. No hooks are left. Modes and
    random streams are the caller's matter, as by `nettrace.freeze.frozen`; what is compiled by
    torch.compile must run eagerly, as it does there.

    Args:
        model: the network.
        probe: the samples.
        head: the name of a module, of which the results are then the outputs, whatever the network
            makes of them. By default it is found.

    Raises:
        NoLastLayerError: if there is no such map; if something else stands behind it, such as a
            softmax; or if it is used twice.
        AttributeError: if there is no module of that name.
    """
    plain = plain_model(model)
    module = None if head is None else _module(plain, head)
    maps = LinearMaps(plain)
    with maps.noting(module), maps:
        outputs, _ = probe.see(plain)
    if module is None:
        found, steps = _at_the_end(maps, outputs)
    else:
        found, steps = _within(maps, head, module), ()
        _check_used_once(maps, found)
        outputs = found.result
    if found.weight.is_complex() or outputs.is_complex():
        raise NoLastLayerError(
            f"the last linear map, {found.name!r}, has complex outputs: return real ones by "
            "forward=, of a linear map with real weights"
        )
    if len(outputs) != len(probe) and (module is not None or probe.forward is None):
        raise NoLastLayerError(
            f"expected results of {found.name!r} for {len(probe)} samples on axis 0, got shape "
            f"{tuple(outputs.shape)}: return them by sample, by forward= or select="
        )
    layer = _arranged(found, outputs, steps)
    _check(layer)
    return layer


def _module(model: nn.Module, head: str) -> nn.Module:
    try:
        return model.get_submodule(head)
    except AttributeError:
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise AttributeError(
            f"{type(model).__name__} has no module {head!r}; its linear layers are "
            f"{', '.join(map(repr, names)) or 'none'}"
        ) from None


def _at_the_end(maps: LinearMaps, outputs: Tensor) -> tuple[LinearMap, tuple[Step, ...]]:
    """The linear map that the outputs are the results of, and the reshapes between."""
    origin = maps.origin(outputs)
    if origin is None:
        raise NoLastLayerError(
            "no linear map leads to the outputs: expected the last operation to be nn.Linear, "
            "F.linear, h @ w + b or a convolution of size 1, of weights that are parameters; name "
            "a module by head=, or return the results of such a map by forward= or select="
        )
    _check_used_once(maps, origin.call)
    if origin.behind:
        name, what = origin.call.name, ", ".join(origin.behind)
        raise NoLastLayerError(
            f"the outputs are not the results of the last linear map, {name!r}: behind it stands "
            f"{what}; pass head={name!r} to take its results for the outputs, if it is a module's, "
            "or return them by forward= or select="
        )
    return origin.call, origin.steps


def _check_used_once(maps: LinearMaps, found: LinearMap) -> None:
    uses = sum(call.parameter == found.parameter for call in maps.calls)
    if uses > 1:
        raise NoLastLayerError(
            f"the last linear map, {found.name!r}, is used {uses} times in one forward pass, but "
            "features are what goes into it once: join what it is called with, and call it once"
        )


def _within(maps: LinearMaps, head: str | None, module: nn.Module) -> LinearMap:
    """The linear map that the named module is."""
    within = [call for call in maps.calls if call.within]
    if len(within) == 1:
        origin = maps.origin(within[0].result)
        if origin is not None and not origin.behind:
            return within[0]
    raise NoLastLayerError(
        f"expected head={head!r} to name one linear map, such as an nn.Linear, that is called once "
        f"in a forward pass, but {type(module).__name__} made {len(within)}"
    )


def _arranged(found: LinearMap, outputs: Tensor, steps: tuple[Step, ...]) -> LastLayer:
    """The features of each sample, and where its outputs stand."""
    weight, inputs = found.weight, found.inputs
    count, features = len(weight), inputs.movedim(1, -1) if found.convolves else inputs
    layer = LastLayer(found.name, weight, found.bias, features, outputs)
    if not steps and not found.convolves:
        return layer
    rows = features.reshape(-1, features.shape[-1])
    numbers = torch.arange(len(rows) * count, device=outputs.device)
    if found.convolves:
        numbers = numbers.view(*features.shape[:-1], count).movedim(-1, 1)
    numbers = numbers.reshape(found.result.shape)
    try:
        for step in steps:
            numbers = step(numbers)
        numbers = numbers.reshape(outputs.shape)
    except (RuntimeError, TypeError, IndexError) as error:
        raise NoLastLayerError(
            f"cannot tell where the results of {found.name!r} stand in the outputs ({error}): "
            "return its results by forward= or select="
        ) from error
    for order, table in _orders(numbers, count):
        chosen = table[0, 0] % count
        in_rows = (table // count == table[..., :1] // count) & (table % count == chosen)
        once = numbers[0].unique().numel() == len(order) and chosen.unique().numel() == len(chosen)
        if not bool(in_rows.all()) or not once:
            continue
        if not torch.equal(chosen, torch.arange(count, device=chosen.device)):
            bias = None if found.bias is None else found.bias[chosen]
            layer = replace(layer, weight=weight[chosen], bias=bias)
        places = (len(outputs), *_positions(outputs, order, len(chosen)))
        features = rows[table[..., 0] // count].reshape(*places, rows.shape[1])
        return replace(
            layer, features=features, order=order if bool((order.diff() != 1).any()) else None
        )
    raise NoLastLayerError(
        f"the outputs, of shape {tuple(outputs.shape)}, are not all results of {found.name!r} at "
        "each position, or stand elsewhere in each sample: return them as (N, ..., C) by forward="
    )


def _orders(numbers: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """How a sample's results may be arranged, and their numbers (N, Q, C) if they are.

    Along one axis; all of one output; or else by their numbers.
    """
    flat, shape = numbers.reshape(len(numbers), -1), numbers.shape[1:]
    own = torch.arange(flat.shape[1], device=flat.device)
    for axis in reversed(range(len(shape))):
        order = own.view(shape).movedim(axis, -1).flatten()
        yield order, flat[:, order].reshape(len(flat), -1, shape[axis])
    yield own, flat[..., None]
    order, width = flat[0].argsort(), len((flat[0] % count).unique())
    if flat.shape[1] % width == 0:
        yield order, flat[:, order].reshape(len(flat), -1, width)


def _positions(outputs: Tensor, order: Tensor, width: int) -> tuple[int, ...]:
    """The shape of the positions within a sample: the outputs' but for the axis of the classes."""
    shape = outputs.shape[1:]
    own = torch.arange(len(order), device=order.device).view(shape)
    for axis in reversed(range(len(shape))):
        if shape[axis] == width and torch.equal(own.movedim(axis, -1).flatten(), order):
            return (*shape[:axis], *shape[axis + 1 :])
    return tuple(shape) if width == 1 else (len(order) // width,)


def _check(layer: LastLayer) -> None:
    """Checks that the outputs are the features' image under weights and bias, to rounding."""
    features, weight = layer.features.detach(), layer.weight.detach()
    outputs = layer.by_position(layer.outputs.detach())
    wide = torch.promote_types(features.dtype, torch.float32)
    found = features.to(wide) @ weight.to(wide).T
    scale = features.to(wide).abs() @ weight.to(wide).abs().T
    if layer.bias is not None:
        bias = layer.bias.detach().to(wide)
        found, scale = found + bias, scale + bias.abs()
    tolerance = _rounding(outputs, features, weight) * scale
    off = (found - outputs.to(wide)).abs()
    wrong = (off > tolerance) & off.isfinite()
    if bool(wrong.any()):
        raise NoLastLayerError(
            f"the outputs differ from features @ weight.T + bias of {layer.name!r} by up to "
            f"{float(off[wrong].max()):.3g}: something changes them, its features or its weights "
            "in place, or by a hook; return the results of the linear map by forward= or select="
        )


def _rounding(outputs: Tensor, features: Tensor, weight: Tensor) -> float:
    """How far results may be off, relative to sums of absolute values."""
    wide = torch.promote_types(features.dtype, torch.float32)
    numbers = (outputs.dtype, features.dtype, weight.dtype)
    coarse = max(torch.finfo(dtype).eps for dtype in numbers)
    reduced = outputs.is_cuda or torch.get_float32_matmul_precision() != "highest"
    if reduced and wide == torch.float32:  # of which products are of fewer digits
        coarse = max(coarse, 2.0**-7)
    return 4 * coarse + 2 * features.shape[-1] * torch.finfo(wide).eps
