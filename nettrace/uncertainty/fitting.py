"""Fits the uncertainties of a network: a covariance from training data, and how to scale it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from nettrace.batch import Select
from nettrace.freeze import frozen
from nettrace.inference import LikelihoodName, check_likelihood
from nettrace.likelihood import Categorical, Likelihood
from nettrace.probe import Forward, Probe
from nettrace.ranks import ALONE, Ranks, purpose, ranks
from nettrace.uncertainty.calibration import Calibrated, Leverages, Objective, Rows, calibrated
from nettrace.uncertainty.fitted import Uncertainties
from nettrace.uncertainty.reading import Reader
from nettrace.unwrapped import plain_model

_TRAINING_SAMPLES = (
    "alpha and the ridge are from training samples, each left out of the covariance in turn, but "
    "not of the training: residuals of new samples are larger than theirs; pass calibration="
)


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    calibration: Iterable[Any] | None = None,
    *,
    head: str | None = None,
    likelihood: LikelihoodName | Likelihood | None = None,
    forward: Forward | None = None,
    select: Select | None = None,
    ridge: float | None = None,
    alpha: float | Tensor | None = None,
    objective: Objective = "nll",
    distributed: bool = False,
) -> Uncertainties:
    """Uncertainties of a trained network's predictions, from its last layer.

    The variance of an output c for an input with last-layer features f is
    alpha_c^2 f^T (F^T F + ridge^2 1)^-1 f, F the features of the training samples, with 1 appended
    where the layer has a bias: last-layer prediction rigidity (Bigi, Chong, Ceriotti and Grasselli
    2024, arXiv:2403.02251). For a linear model it is the posterior of Bayesian linear regression,
    with alpha the noise and alpha / ridge the prior's standard deviation. Alpha and the ridge are
    calibrated, so that the variance of a regression is that of targets about predictions, and that
    of a classification is of logits.

    Sums are in float64, and the same whatever the batches. Each position of a sample, such as a
    token or pixel, counts as a sample of its own; classes of -100 are left out. The network is left
    bitwise as it was.

    Args:
        model: the network, trained.
        loader: batches of the training samples, as `nettrace.Probe.from_batch` takes them: pairs,
            mappings, dataclasses or inputs alone.
        calibration: batches of other samples, with targets, to calibrate on. By default, training
            samples, each left out of the covariance in turn; there is a doubt about that.
        head: the name of the last linear layer, of which the results are then the predictions. By
            default it is found, see `nettrace.last_layer.last_layer`.
        likelihood: "gaussian" for regression or "categorical" for classes; by default what targets
            suggest.
        forward: as in `nettrace.Probe`.
        select: as in `nettrace.Probe`.
        ridge: in units of the features times the root of their number, to be kept as it is; 0 for
            none, which takes a covariance of full rank.
        alpha: of all outputs or each, to be kept as it is.
        objective: what is least: "nll", the negative log-likelihood, or "ssl", the authors' sum of
            squared logarithms of errors in bins of 100 samples, for regression.
        distributed: whether all processes of `torch.distributed` call this, each with batches of
            its share of the samples. All get the same.

    Raises:
        ValueError: if there are no samples, features are not finite or all zero, there is nothing
            to calibrate on, or arguments do not fit.
        NoLastLayerError: if the network's head is not linear.
        RuntimeError: if not all processes came with one network.
    """
    check_likelihood(likelihood)
    _check(loader, "loader")
    if calibration is not None:
        _check(calibration, "calibration")
    if objective not in ("nll", "ssl"):
        raise ValueError(f"expected objective to be 'nll' or 'ssl', got {objective!r}")
    for name, value in (("ridge", ridge), ("alpha", alpha)):
        numbers = (int, float, Tensor) if name == "alpha" else (int, float)
        if value is not None and not isinstance(value, numbers):
            raise TypeError(f"expected {name}= to be a number, got {value!r}")
    if ridge is not None and not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"expected a ridge of at least 0, got {ridge}")
    given = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float64).detach()
    if given is not None and not bool((given > 0).all() & given.isfinite().all()):
        raise ValueError(f"expected alpha above 0, got {alpha}")

    plain = plain_model(model)
    group = _group(plain) if distributed else ALONE
    needed = given is None or ridge is None
    reader = Reader(plain, head, likelihood, forward, select)
    with group.together(), frozen(plain), torch.no_grad():
        covariance, rows = reader.read(loader, "loader", calibration is None and needed)
        if calibration is not None and needed:
            _, rows = reader.read(calibration, "calibration", True)
    covariance = covariance.over(group)
    found, kind = reader.head, reader.likelihood
    classes = isinstance(kind, Categorical)
    if objective == "ssl" and classes:
        raise ValueError("the objective 'ssl' is for regression: classes have no squared errors")
    if given is not None:
        if given.numel() not in (1, found.outputs):
            raise ValueError(
                f"expected one alpha, or one for each of {found.outputs} outputs, got "
                f"{given.numel()}"
            )
        given = given.reshape(-1).expand(found.outputs).to(covariance.sums.device)
    if ridge is not None:
        covariance.root(ridge)  # which raises where there is none
    doubts: list[str] = []
    if given is not None and ridge is not None:
        scaled, count = Calibrated(ridge, given), 0
    else:
        assert rows is not None
        rows = Rows(*(group.join(t) for t in (rows.features, rows.outputs, rows.targets)))
        leverages = Leverages(covariance, rows.features, left_out=calibration is None)
        scaled = calibrated(
            rows, leverages, classes=classes, ridge=ridge, alpha=given, objective=objective
        )
        count = len(rows.targets)
        doubts += [_TRAINING_SAMPLES] if calibration is None else []
    doubts += scaled.doubts
    if covariance.rank < covariance.width:
        doubts.append(
            f"the covariance of {covariance.count} features of width {covariance.width} has rank "
            f"{covariance.rank}: in other directions, variances rest on the ridge alone"
        )
    options: dict[str, Any] = {"forward": forward, "select": select}
    return Uncertainties(plain, found, covariance, scaled, kind, tuple(doubts), count, **options)


def _check(loader: object, what: str) -> None:
    of_samples = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    is_batch = isinstance(loader, (Tensor, Probe, dict)) or (
        isinstance(loader, tuple) and any(isinstance(one, Tensor) for one in loader)
    )
    if of_samples or is_batch or not hasattr(loader, "__iter__"):
        kind = type(loader).__name__
        remedy = "[(x, y)]" if is_batch else "torch.utils.data.DataLoader(data, batch_size=64)"
        raise TypeError(
            f"expected {what}= to be a loader or another iterable of batches, got {kind}: pass "
            f"{remedy}"
        )


def _group(model: nn.Module) -> Ranks:
    group = ranks(purpose("uncertainty.fit"), model)
    torchs = torch.distributed
    several = torchs.is_available() and torchs.is_initialized() and torchs.get_world_size() > 1
    if several and group.count == 1:
        raise RuntimeError(
            "not all processes came to fit uncertainties with the same weights: call fit(..., "
            "distributed=True) in each after the training, or distributed=False in one, with all "
            "samples"
        )
    return group
