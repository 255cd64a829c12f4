"""Directions in the space of weights, along which the loss is looked at.

The loss of networks with rectified units does not change when the weights into a unit are scaled
and those out of it are divided by as much, so that steps of one length mean different things to
different networks. Filter normalisation gives each filter of a random direction the norm of the
weights' own (Li et al. 2018, Visualizing the loss landscape of neural nets, arXiv:1712.09913,
section 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nettrace.estimators import generator
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.matrices import curvature
from nettrace.operator import PerLayer
from nettrace.probe import Probe
from nettrace.second_order import CurvatureOperator

Named: TypeAlias = Literal["random", "hessian", "gradient", "trajectory"]
Direction: TypeAlias = Named | Tensor | Mapping[str, Tensor]
Normalise: TypeAlias = Literal["filter", "unit", "none"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_SAID: dict[Normalise, str] = {
    "filter": "filters (slices along axis 0 of parameters with two axes or more) scaled to the "
    "norms of the weights' filters, other parameters and those of normalisations zero",
    "unit": "length one over all weights",
    "none": "as given",
}


@dataclass(frozen=True)
class Directions:
    """One direction or two.

    Args:
        vectors: (D, P).
        kinds: what each is: one of the names, or "given".
        how: how each is normalised.
        said: of each, what it is and how it is normalised, in words.
        eigenvalues: (D,) of the Hessian's eigenvectors, NaN of others.
        explained: (D,) the share of a trajectory's variance along its components, NaN of others.
        doubts: what makes them doubtful.
    """

    vectors: Tensor
    kinds: Sequence[str]
    how: Sequence[Normalise]
    said: Sequence[str]
    eigenvalues: Tensor
    explained: Tensor
    doubts: Sequence[str]


def directions(
    model: nn.Module,
    probe: Probe,
    loss: WeightLoss,
    wanted: Sequence[Direction],
    normalise: Normalise | None,
    path: Tensor | None,
    seed: int,
) -> Directions:
    """Directions by name: of several with one name, the first, the second and so on.

    Args:
        model: the network, frozen.
        probe: the samples.
        loss: their loss, which knows of which parameters directions are.
        wanted: names or vectors.
        normalise: "filter", "unit" or "none"; None for "filter" where random, "none" where given,
            else "unit".
        path: (T, P) the weights of a trajectory.
        seed: of random directions.

    Raises:
        ValueError: if a direction is not known, zero, not finite or of another size; or two are
            parallel.
    """
    if normalise is not None and normalise not in _SAID:
        raise ValueError(f"expected normalise= 'filter', 'unit', 'none' or None, got {normalise!r}")
    names = [one for one in wanted if isinstance(one, str)]
    for name in names:
        if name not in get_args(Named):
            raise ValueError(
                f"expected a direction to be {', '.join(map(repr, get_args(Named)))}, a vector or "
                f"a mapping of parameters' names to tensors, got {name!r}"
            )
    if names.count("gradient") > 1:
        raise ValueError("there is one gradient: choose another direction beside it")
    found = _Found(model, probe, loss, path, Counter(names), seed)
    vectors, said, kinds, hows, numbers = [], [], [], [], torch.full((2, len(wanted)), torch.nan)
    seen: Counter[str] = Counter()
    for place, one in enumerate(wanted):
        if isinstance(one, str):
            kind, rank = str(one), seen[one]
            vector, number = found.named(kind, rank)
            seen[one] += 1
            if kind in ("hessian", "trajectory"):
                numbers[int(kind == "trajectory"), place] = number
        else:
            kind, rank, vector = "given", 0, _given(one, loss)
        default: Normalise = {"random": "filter", "given": "none"}.get(kind, "unit")  # type: ignore[assignment]
        how = normalise or default
        vectors.append(_normalised(vector, how, model, loss, kind))
        kinds.append(kind)
        hows.append(how)
        said.append(f"{_ABOUT[kind].format(rank=rank + 1, seed=seed)}; {_SAID[how]}")
    together = torch.stack(vectors)
    if len(vectors) == 2 and _cosine(together) > 1 - 1e-6:
        raise ValueError("the two directions are parallel: they span no plane")
    return Directions(together, kinds, hows, said, numbers[0], numbers[1], found.doubts)


_ABOUT = {
    "random": "normal deviates (seed {seed}, draw {rank})",
    "hessian": "eigenvector {rank} of the Hessian of the mean loss, by eigenvalue from the largest",
    "gradient": "gradient of the mean loss",
    "trajectory": "principal component {rank} of the trajectory's weights",
    "given": "given",
}


class _Found:
    """Directions that go by name, each kind found once."""

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        loss: WeightLoss,
        path: Tensor | None,
        counts: Counter[str],
        seed: int,
    ) -> None:
        self._model, self._probe, self._loss = model, probe, loss
        self._path, self._counts, self._seed = path, counts, seed
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self.doubts: list[str] = []

    def named(self, kind: str, rank: int) -> tuple[Tensor, float]:
        """A direction (P,), and the number that comes with it."""
        if kind not in self._known:
            self._known[kind] = getattr(self, f"_{kind}")()
        vectors, numbers = self._known[kind]
        return vectors[rank], float(numbers[rank])

    def _random(self) -> tuple[Tensor, Tensor]:
        count = self._counts["random"]
        draws = generator(self._seed, "slices")
        found = torch.randn(count, self._loss.size, generator=draws, dtype=torch.float64)
        return found.to(self._loss.point), torch.full((count,), torch.nan)

    def _gradient(self) -> tuple[Tensor, Tensor]:
        _, found = self._loss.gradients(self._loss.point[None])
        return found, torch.full((1,), torch.nan)

    def _hessian(self) -> tuple[Tensor, Tensor]:
        count = self._counts["hessian"]
        full = curvature(self._model, self._probe)
        parts = {name: full.parameters[name] for name in self._loss.parameters}
        zeros = {n: torch.zeros_like(p) for n, p in full.parameters.items() if n not in parts}

        def product(vectors: PerLayer) -> PerLayer:
            found = full.product({**zeros, **vectors})
            return {name: found[name] for name in parts}

        block = CurvatureOperator(product, parts, full.dtype)
        # One more than asked for, to find both of a close pair.
        top, _ = block.eigenpairs(count + 1, seed=self._seed)
        if len(top.values) < count:
            raise ValueError(f"there are {len(top.values)} weights, of which {count} directions")
        if not top.converged:
            self.doubts.append("the Hessian's eigenvectors have not converged")
        return _signed(top.vectors[:, :count].T).to(self._loss.point), top.values[:count]

    def _trajectory(self) -> tuple[Tensor, Tensor]:
        count, path = self._counts["trajectory"], self._path
        if path is None:
            raise ValueError(
                "directions of a trajectory need one: pass trajectory= a list of networks, states "
                "or checkpoints"
            )
        centred = path.double() - path.double().mean(0)
        # Of the T x T matrix, as there are fewer checkpoints than weights.
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        values, vectors = values.flip(0), vectors.flip(1)
        resolved = values > 1e-12 * values[0].clamp_min(1e-300) * len(path)
        if int(resolved.sum()) < count:
            raise ValueError(
                f"expected a trajectory that moves along {count} directions or more, got one of "
                f"{len(path)} weights that moves along {int(resolved.sum())}"
            )
        found = centred.T @ vectors[:, :count] / values[:count].sqrt()
        return _signed(found.T).to(path), (values / values.sum())[:count]


def _signed(vectors: Tensor) -> Tensor:
    """The same with the sign by which the entry of the largest modulus is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _given(one: object, loss: WeightLoss) -> Tensor:
    if isinstance(one, Mapping):
        if unknown := [name for name in one if name not in loss.parameters]:
            raise ValueError(
                f"the direction has {unknown[0]!r}, which is no parameter that varies: there are "
                f"{', '.join(list(loss.parameters)[:6])}{' ...' * (len(loss.parameters) > 6)}"
            )
        for name, part in one.items():
            if part.shape != loss.parameters[name].shape:
                raise ValueError(
                    f"expected {name} of the direction to have the shape "
                    f"{tuple(loss.parameters[name].shape)}, got {tuple(part.shape)}"
                )
        zeros = {n: torch.zeros_like(p) for n, p in loss.parameters.items() if n not in one}
        like = {name: part.detach().to(loss.parameters[name]) for name, part in one.items()}
        return loss.flat({**zeros, **like})
    if not isinstance(one, Tensor):
        raise TypeError(
            "expected a direction to be a name, a vector or a mapping of parameters' names to "
            f"tensors, got {type(one).__name__}"
        )
    if one.shape != (loss.size,):
        raise ValueError(
            f"expected a direction of shape ({loss.size},), a number for each weight, got "
            f"{tuple(one.shape)}"
        )
    return one.detach().to(loss.point)


def _normalised(
    vector: Tensor, how: Normalise, model: nn.Module, loss: WeightLoss, kind: str
) -> Tensor:
    if how == "filter":
        vector = _filtered(vector, model, loss)
    length = float(vector.double().norm())
    if not 0 < length < float("inf"):
        raise ValueError(
            f"the direction ({kind}, normalise={how!r}) has the length {length:g}: "
            + (
                "no parameter that varies has filters, choose normalise='unit'"
                if how == "filter"
                else "it must be finite and not zero"
            )
        )
    return vector / length if how == "unit" else vector


def _filtered(vector: Tensor, model: nn.Module, loss: WeightLoss) -> Tensor:
    of_norms = {
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    point, found = loss.split(loss.point), {}
    for name, part in loss.split(vector).items():
        if part.dim() < 2 or name in of_norms:
            found[name] = torch.zeros_like(part)
            continue
        own, drawn = point[name].flatten(1).norm(dim=1), part.flatten(1).norm(dim=1)
        scale = torch.where(drawn > 0, own / drawn, 0)
        found[name] = part * scale.view(-1, *[1] * (part.dim() - 1))
    return loss.flat(found)


def _cosine(pair: Tensor) -> float:
    one, other = pair.double()
    return abs(float(one @ other / (one.norm() * other.norm())))
