"""What the layers of a network make of samples: activations, taken by name from a forward pass.

A name is that of a module, for what it returns, or of a function that is called within one, as
"blocks.0.gelu", or "relu" in the network's own forward: any function of torch that gives a tensor,
under its name there, so that `a @ b` is "matmul" and `a + b` "add". Functions are seen as they are
called, rather than read off the tape, which has no values. The second call of a module, and of a
function within one call of a module, adds "#2", and so on; of several tensors that are returned,
the third is "lstm[2]".
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nettrace.batch import tensors
from nettrace.differentiate import parse_bytes
from nettrace.freeze import frozen, undone
from nettrace.operator import OverBudgetError, PerLayer
from nettrace.probe import Probe
from nettrace.unwrapped import plain_model

#: How many layers are taken at most where none are named.
MOST = 32


def activations(
    model: nn.Module,
    probe: Probe,
    layers: str | Sequence[str] | None = None,
    *,
    memory_budget: int | str = "2GiB",
) -> PerLayer:
    """What layers make of a probe's samples, by name; the network is left exactly as it was.

    Which axis counts the samples is found by evaluating them again in another order, so that time
    may come first, or rows be those of all tokens. What does not follow the samples, or mixes
    them, is left out where a pattern takes it, and refused where it is named.

    Args:
        model: the network; evaluated in eval mode, and eagerly where it is compiled.
        probe: the N samples.
        layers: names, or patterns such as "blocks.*.gelu", "*" for anything with its dots. A name
            stands for all calls of that layer, "act#1" for its first alone; a pattern of which the
            last part is "*" takes modules alone. By default those of `probe.layers`; else the
            modules of the deepest level of the network of which there are no more than 32, but for
            those that give what they are given, or in a network without modules the functions that
            it calls, at even distances.
        memory_budget: bytes that they may take together.

    Returns:
        Tensors (N, ...), in the order in which they are computed, detached and copied: what is
        written to them in place later on is not in them.

    Raises:
        ValueError: if nothing is called by that name, with the nearest that is; or if a layer that
            is named has no axis of samples.
        OverBudgetError: if they take more than the budget.
        TypeError: if it is no probe, or layers are no texts.

    Example:
        >>> import torch, nettrace as nt
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> probe = nt.Probe(torch.randn(8, 3))
        >>> {name: tuple(a.shape) for name, a in nt.activations(model, probe).items()}
        {'0': (8, 5), '1': (8, 5), '2': (8, 2)}
        >>> list(nt.activations(model, probe, ["1.tanh", "2"]))
        ['1.tanh', '2']
    """
    if not isinstance(probe, Probe):
        raise TypeError(
            f"expected a nettrace.Probe, got {type(probe).__name__}: wrap samples as Probe(inputs)"
        )
    model = plain_model(model)
    with frozen(model):
        with undone(model):
            samples = len(probe.look(model))
        return captured(model, probe, samples, layers, parse_bytes(memory_budget))


def captured(
    model: nn.Module,
    probe: Probe,
    samples: int,
    layers: str | Sequence[str] | None,
    memory: int,
) -> PerLayer:
    """`activations` of a network that is frozen, of which the outputs have so many samples."""
    layers = probe.layers if layers is None else layers
    patterns = [layers] if isinstance(layers, str) else list(layers or ())
    if patterns:
        found = _Watch(model, partial(_matching, patterns), memory).called(probe)
        for pattern in patterns:
            if not any(_matches(pattern, *call) for call in found.calls):
                _refuse(pattern, found)
        result, left_out = _by_sample(model, probe, samples, found)
        named = {one for one in left_out if {one, one.partition("#")[0]} & set(patterns)}
        for label in left_out if not result else sorted(named):
            raise ValueError(
                f"the layer {label!r}, of shape {left_out[label]}, has no axis along which the "
                f"{samples} samples lie, or mixes them: name others by layers="
            )
        return result
    calls = _Watch(model, lambda *_: False, memory).called(probe).calls
    for labels in (_modules(calls), _functions(calls)):
        chosen = set(labels)
        found = _Watch(model, lambda _, label, *__, c=chosen: label in c, memory).called(probe)
        result, _ = _by_sample(model, probe, samples, found)
        if result:
            return result
    raise ValueError(
        "no module or function of the network was seen to give a tensor of numbers with an axis of "
        "samples, as within transforms such as vmap: name what does by layers="
    )


def count(model: nn.Module, probe: Probe) -> int:
    """How many layers `captured` would look at, or a few more; of a network that is frozen."""
    calls = _Watch(model, lambda *_: False, 0).called(probe).calls
    patterns = [probe.layers] if isinstance(probe.layers, str) else list(probe.layers or ())
    if patterns:
        return sum(_matching(patterns, *call) for call in calls)
    return len(_modules(calls)) or len(_functions(calls))


#: A call: the layer's name without a number, its label, whether it is a function, and whether it
#: gives what it was given, or a view of it.
_Call = tuple[str, str, bool, bool]


class _Watch(TorchFunctionMode):
    """Sees what modules and functions return in a forward pass, and keeps what is wanted of it.

    Args:
        model: the network.
        wanted: by what `_Call` has.
        memory: bytes that may be kept.

    Attributes:
        calls: all that gave a tensor, in order.
        kept: by label.
    """

    def __init__(
        self, model: nn.Module, wanted: Callable[[str, str, bool, bool], bool], memory: int
    ) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.kept: dict[str, Tensor] = {}
        self._model, self._wanted, self.memory = model, wanted, memory
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        #: The calls of modules that are under way.
        self._within: list[str] = [""]

    def called(self, probe: Probe) -> _Watch:
        """Itself, after a forward pass, of which the network keeps nothing, such as averages."""
        with undone(self._model), _hooked(self._model, self._enter, self._leave), self:
            probe.look(self._model)
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function, and sees what it returns."""
        before = _versions(args, kwargs)
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0].strip("_")
        if name != "get":  # of attributes such as x.T
            path = f"{self._within[-1]}.{name}".lstrip(".")
            self._see(path, self._label(path), found, before, True)
        return found

    def _enter(self, path: str) -> None:
        self._within.append(self._label(path))

    def _leave(self, path: str, found: Any, before: dict[int, int]) -> None:
        label = self._within.pop()
        if path:
            self._see(path, label, found, before, False)

    def _label(self, path: str) -> str:
        self._counts[path] += 1
        return path if self._counts[path] == 1 else f"{path}#{self._counts[path]}"

    def _see(
        self, path: str, label: str, found: Any, before: dict[int, int], function: bool
    ) -> None:
        numbers = [t for t in _plain_tensors(found) if t.is_floating_point() or t.is_complex()]
        several = len(numbers) > 1
        for place, tensor in enumerate(numbers):
            same = before.get(tensor.untyped_storage().data_ptr()) == tensor._version
            call = (path, f"{label}[{place}]" if several else label, function, same)
            self.calls.append(call)
            if not self._wanted(*call):
                continue
            self._bytes += tensor.numel() * tensor.element_size()
            if self._bytes > self.memory:
                raise OverBudgetError(
                    f"activations take more than memory_budget={self.memory:,} bytes, with "
                    f"{len(self.kept)} layers before {call[1]!r}: name fewer by layers=, or take a "
                    "smaller probe"
                )
            self.kept[call[1]] = tensor.detach().clone()


@contextmanager
def _hooked(
    model: nn.Module,
    enter: Callable[[str], None],
    leave: Callable[[str, Any, dict[int, int]], None],
) -> Iterator[None]:
    """Calls functions before and after each module, meanwhile."""
    given: list[dict[int, int]] = []

    def entering(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            given.append(_versions(args, kwargs))
            enter(path)

    def leaving(path: str, _: nn.Module, args: Any, found: Any) -> None:
        with torch._C.DisableTorchFunction():
            leave(path, found, given.pop())

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "_orig_mod":  # called by what compiles it
                continue
            hook = partial(entering, _plain(name))
            before = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(partial(leaving, _plain(name))).remove)
        yield


def _versions(*given: Any) -> dict[int, int]:
    """By the memory of each tensor that is given, how often it was written to."""
    return {t.untyped_storage().data_ptr(): t._version for t in _plain_tensors(given)}


def _plain_tensors(tree: Any) -> Iterator[Tensor]:
    """Those with numbers of their own, as sparse ones and those within `vmap` have not."""
    for one in tensors(tree):
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(one)
        if one.layout is torch.strided and not (wrapped or one.is_inference() or one.is_meta):
            yield one


def _plain(name: str) -> str:
    """A module's name as it is where nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _modules(calls: Sequence[_Call]) -> list[str]:
    """Calls of modules at the deepest level of which there are few enough, and leaves above it.

    A leaf is what calls no others, but for those that make its weights.
    """
    modules = [
        call for call in calls if not call[2] and "parametrizations" not in call[0].split(".")
    ]
    inner = {path.rpartition(".")[0] for path, *_ in modules}
    new = [(path, label) for path, label, _, same in modules if not same]
    best: list[str] = []
    for depth in range(max((path.count(".") for path, _ in new), default=-1) + 1):
        level = [
            label
            for path, label in new
            if path.count(".") == depth or (path.count(".") < depth and path not in inner)
        ]
        if len(level) > MOST:
            return best or _spaced(level)
        best = level
    return best


def _functions(calls: Sequence[_Call]) -> list[str]:
    """Calls of functions that give something new, at even distances if there are many."""
    return _spaced([label for _, label, function, same in calls if function and not same])


def _spaced(labels: Sequence[str]) -> list[str]:
    few = min(MOST, len(labels))
    return [labels[i * len(labels) // few] for i in range(few)]


def _matching(patterns: Sequence[str], *call: Any) -> bool:
    return any(_matches(pattern, *call) for pattern in patterns)


def _matches(pattern: str, path: str, label: str, function: bool, same: bool) -> bool:
    if pattern in (path, label) or (pattern == f"{path}#1" and path == label.partition("[")[0]):
        return True
    if function and pattern.rpartition(".")[2] == "*":
        return False
    return fnmatchcase(label, pattern) or fnmatchcase(path, pattern)


def _refuse(pattern: str, found: _Watch) -> None:
    known = list(dict.fromkeys(name for call in found.calls for name in call[:2]))
    near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.5) or known[:8]
    others = f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    raise ValueError(
        f"layers= has {pattern!r}, but no module or function of that name gives a tensor in the "
        f"forward pass: there are {', '.join(map(repr, near))}{others}; a pattern of which the "
        "last part is '*' takes modules alone, and what runs within a scripted module or a fused "
        "function is not seen"
    )


# Which axis counts the samples --------------------------------------------------------------------

#: An axis, how many rows a sample has along it, and whether those of a sample are neighbours.
_Place: TypeAlias = tuple[int, int, bool]


def _by_sample(
    model: nn.Module, probe: Probe, samples: int, found: _Watch
) -> tuple[PerLayer, dict[str, tuple[int, ...]]]:
    """The activations with the samples on axis 0, and the shapes of those without such an axis.

    The samples are evaluated again in two parts and another order, which shows also what mixes them
    whatever their order is.
    """

    def evaluated(some: Probe | None) -> PerLayer:
        assert some is not None
        wanted = found.kept
        return _Watch(model, lambda _, label, *__: label in wanted, found.memory).called(some).kept

    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    cut = (samples - 1) // 2 or 1
    told = samples == len(probe) and probe.take(order) is not None
    parts: list[tuple[Tensor, PerLayer]] = []
    if samples > 1 and told:
        try:
            parts = [(some, evaluated(probe.take(some))) for some in (order[:cut], order[cut:])]
        except Exception:  # a network for batches of one size
            parts = [(order, evaluated(probe.take(order)))]
    twice: PerLayer | None = None
    result, left_out = {}, {}
    for label, tensor in found.kept.items():
        place: _Place | None = None
        if samples == 1 or not told:  # where those of the outputs are
            place = (0, 1, True) if tensor.shape[:1] == (samples,) else None
        else:
            place = _following(label, tensor, parts, samples, 0.0)
            if place is None:  # which may be for the noise of a network that draws at random
                twice = evaluated(probe) if twice is None else twice
                noise = _largest_difference(tensor, twice.get(label))
                place = _following(label, tensor, parts, samples, 10 * noise) if noise else None
        if place is not None:
            result[label] = _rows(tensor, place, samples)
        elif samples == 1 and told:
            result[label] = tensor[None]
        else:
            left_out[label] = tuple(tensor.shape)
    return result, left_out


def _following(
    label: str,
    tensor: Tensor,
    parts: Sequence[tuple[Tensor, PerLayer]],
    samples: int,
    noise: float,
) -> _Place | None:
    """The first place along which each part of the samples has the rows that it has in the whole.

    Args:
        label: the layer's.
        tensor: what it makes of all samples.
        parts: the numbers of some samples, and what layers make of these.
        samples: how many there are.
        noise: how far numbers may differ, beside rounding.
    """
    largest = float(torch.nan_to_num(tensor).abs().max()) if tensor.numel() else 0.0
    bound = min(1e3 * torch.finfo(tensor.dtype).eps, 0.03) * largest + noise
    for place in _places(tensor, samples):
        rows = _rows(tensor, place, samples)
        same = (_same(rows[k.to(rows.device)], part.get(label), place, bound) for k, part in parts)
        if all(same):
            return place
    return None


def _same(expected: Tensor, found: Tensor | None, place: _Place, bound: float) -> bool:
    axis, each, _ = place
    if found is None or found.dim() <= axis or found.shape[axis] != each * len(expected):
        return False
    rows = _rows(found, place, len(expected))
    if rows.shape != expected.shape:
        return False
    return bool(((rows - expected).abs().nan_to_num(nan=0.0) <= bound).all())


def _places(tensor: Tensor, samples: int) -> list[_Place]:
    """Where the samples may be."""
    return [
        (axis, length // samples, major)
        for axis, length in enumerate(tensor.shape)
        if length and length % samples == 0
        for major in ((True,) if length == samples else (True, False))
    ]


def _rows(tensor: Tensor, place: _Place, samples: int) -> Tensor:
    """The tensor with its samples on axis 0."""
    axis, each, major = place
    if each == 1:
        return tensor.movedim(axis, 0)
    apart: Tensor = tensor.unflatten(axis, (samples, each) if major else (each, samples))
    return apart.movedim(axis if major else axis + 1, 0)


def _largest_difference(one: Tensor, other: Tensor | None) -> float:
    if other is None or other.shape != one.shape or not one.numel():
        return 0.0
    return float((one - other).nan_to_num().abs().max())
