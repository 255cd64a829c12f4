"""The linear maps that a network calls, and what its outputs are made of behind them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class LinearMap:
    """A linear map that was called.

    Args:
        name: of its weight's module, or of the weight.
        parameter: the parameter that the weight depends on, the first if there are several.
        weight: (C, d).
        bias: (C,) or None.
        inputs: what it was called with, (..., d) or of a convolution (N, d, ...).
        result: what it gave.
        convolves: whether it is a convolution.
        within: whether it was called by the module that was named.
    """

    name: str
    parameter: str
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    result: Tensor
    convolves: bool
    within: bool


@dataclass(frozen=True)
class Step:
    """A reshape or selection, and which of its results is meant if there are several."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    number: int | None

    def __call__(self, values: Tensor) -> Tensor:
        """The same of other values."""
        arguments = tuple(values if a is _HERE else a for a in self.arguments)
        options = {k: values if v is _HERE else v for k, v in self.options.items()}
        found = self.function(*arguments, **options)
        one: Tensor = found if self.number is None else found[self.number]
        return one


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: a linear map, by reshapes, or by something else behind it."""

    call: LinearMap
    steps: tuple[Step, ...] = ()
    behind: tuple[str, ...] = ()


#: Stands in a step's arguments for what is reshaped.
_HERE = object()


def _functions(*names: str) -> set[Any]:
    return {f for place in (torch, Tensor, F) for n in names if (f := getattr(place, n, None))}


_PRODUCTS = _functions("matmul", "mm", "__matmul__")
_ADDMM = _functions("addmm")
_CONVOLUTIONS = _functions("conv1d", "conv2d", "conv3d")
_MAPS = _functions("linear") | _CONVOLUTIONS
_SUMS = _functions("add", "__add__", "__radd__", "__iadd__", "add_")
_SAME = _functions(
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to", "type_as"),
    *("type", "cpu", "cuda", "requires_grad_"),
)
_SAME.add(Tensor.data.__get__)  # type: ignore[attr-defined]
_DROPOUTS = _functions(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
)
_RESHAPES = _functions(
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose"),
    *("t", "movedim", "moveaxis", "swapaxes", "swapdims", "select", "narrow", "chunk", "split"),
    *("tensor_split", "unbind", "__getitem__", "view_as", "reshape_as", "index_select", "gather"),
    *("take_along_dim", "flip", "roll", "expand", "expand_as"),
)
_RESHAPES |= {getattr(Tensor, name).__get__ for name in ("T", "mT")}
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "poisson", "multinomial", "exponential")


class LinearMaps(TorchFunctionMode):
    """Notes linear maps, what follows on them, and what depends on parameters alone.

    Args:
        model: whose parameters these are.

    Attributes:
        calls: the linear maps with constant weights, in their order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[LinearMap] = []
        #: What depends on parameters alone, with a parameter's name.
        self._constants: Any = WeakIdKeyDictionary()
        for name, one in itertools.chain(model.named_buffers(), model.named_parameters()):
            self._constants[one] = name
        self._origins: Any = WeakIdKeyDictionary()
        self._inside = False

    def origin(self, outputs: Tensor) -> Origin | None:
        """Where a tensor comes from, None if from no linear map that was seen."""
        found: Origin | None = self._origins.get(outputs)
        return found

    @contextmanager
    def noting(self, module: nn.Module | None) -> Iterator[None]:
        """Notes of maps in this whether the module calls them."""
        if module is None:
            yield
            return

        def entered(*_: Any) -> None:
            self._inside = True

        def left(*_: Any) -> None:
            self._inside = False

        handles = [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls it, and notes what it is."""
        options = kwargs or {}
        found = func(*args, **options)
        if isinstance(found, (Tensor, tuple, list)):
            self._note(func, args, options, list(_flat((found,))))
        elif func is Tensor.__setitem__:
            self._note(func, args, options, [args[0]])
        return found

    def _note(self, func: Any, args: tuple[Any, ...], options: Any, found: list[Tensor]) -> None:
        given = list(_flat((*args, *options.values())))
        if not given or not found:
            return
        names = [self._constants.get(one) for one in given]
        if all(name is not None for name in names):
            if not getattr(func, "__name__", "").startswith(_RANDOM):
                self._constants.update({one: names[0] for one in found})
            return
        call = self._map(func, args, options, found[0])
        if call is not None:
            self.calls.append(call)
            self._origins[found[0]] = Origin(call)
            return
        origins = [origin for one in given if (origin := self._origins.get(one)) is not None]
        if origins and not self._followed(func, args, options, found, origins):
            last = origins[-1] if origins[-1].behind else origins[0]
            of = func.__self__ if getattr(func, "__name__", "") == "__get__" else func
            what = str(getattr(of, "__name__", of)).strip("_")
            behind = Origin(last.call, (), (*last.behind, what)[:3])
            self._origins.update({one: behind for one in found})

    def _followed(
        self,
        func: Any,
        args: tuple[Any, ...],
        options: Any,
        found: list[Tensor],
        origins: list[Origin],
    ) -> bool:
        """Notes what leaves the results of a linear map what they are."""
        after = origins[0]
        if len(origins) > 1 or after.behind:
            return False
        first = args[0] if args else options.get("input")
        is_first = isinstance(first, Tensor) and self._origins.get(first) is after
        idle = func in _DROPOUTS and not {**dict(enumerate(args)), **options}.get(
            "training", args[2] if len(args) > 2 else True
        )
        if is_first and (func in _SAME or idle):
            self._origins.update({one: after for one in found})
            return True
        if is_first and func in _RESHAPES:
            given = tuple(_HERE if a is first else a for a in args)
            named = {k: _HERE if v is first else v for k, v in options.items()}
            for number, one in enumerate(found):
                step = Step(func, given, named, number if len(found) > 1 else None)
                self._origins[one] = Origin(after.call, (*after.steps, step))
            return True
        biased = self._biased(func, args, options, found[0], after)
        if biased is not None:
            self.calls = [biased if call is after.call else call for call in self.calls]
            self._origins[found[0]] = Origin(biased)
        return biased is not None

    def _map(
        self, func: Any, args: tuple[Any, ...], options: Any, found: Tensor
    ) -> LinearMap | None:
        """What was called as a linear map, if it is one of known weights."""
        values = [*args, *options.values()]
        bias = None
        if func in _MAPS:
            named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **options}
            inputs, weight, bias = named["input"], named["weight"], named.get("bias")
        elif func in _PRODUCTS and len(values) == 2:
            inputs, weight = values
        elif func in _ADDMM and len(values) == 3:
            bias, inputs, weight = values
        else:
            return None
        name = self._constants.get(weight)
        if name is None or (bias is not None and self._constants.get(bias) is None):
            return None
        matrix = weight
        if func in _CONVOLUTIONS:
            alike = inputs.dim() == weight.dim() and found.shape[2:] == inputs.shape[2:]
            if not alike or weight.shape[1] != inputs.shape[1] or weight[0, 0].numel() > 1:
                return None
            matrix = weight.flatten(1)
        if weight.dim() == 1:
            matrix = weight[None]
        elif weight.dim() == 2 and func not in _MAPS:
            matrix = weight.T
        if (
            matrix.dim() != 2
            or inputs.dim() < 2
            or (bias is not None and bias.numel() != len(matrix))
        ):
            return None
        short = f".{name}".partition(".parametrizations.")[0].removesuffix(".weight")[1:]
        flat = None if bias is None else bias.reshape(-1)
        convolves = func in _CONVOLUTIONS
        return LinearMap(
            short or "weight", name, matrix, flat, inputs, found, convolves, self._inside
        )

    def _biased(
        self, func: Any, args: tuple[Any, ...], options: Any, found: Tensor, after: Origin
    ) -> LinearMap | None:
        """The same map with what is added to its results, if that depends on parameters alone."""
        values = [v for v in args if isinstance(v, Tensor)]
        call = after.call
        if func not in _SUMS or len(values) != 2 or options or after.steps:
            return None
        (bias,) = (v for v in values if self._origins.get(v) is not after)
        outputs = len(call.weight)
        # One number for all is the bias of each; else the bias runs along the outputs' axis.
        fits = bias.numel() == 1 or (bias.numel() == bias.shape[-1] == outputs)
        known = self._constants.get(bias) is not None
        if not (known and fits) or found.shape != call.result.shape or call.convolves:
            return None
        if call.bias is not None:
            return None
        return replace(call, bias=bias.reshape(-1).expand(outputs), result=found)


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)
