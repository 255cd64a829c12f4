"""Neural collapse: what goes into the last layer at the end of a training to classes.

With mu_k the mean of the features of class k, mu_G the mean of those, and S_W the covariance of
features around the means of their classes: variability within classes vanishes against that between
them (NC1), means form a simplex, equally long and with cosines -1 / (K - 1) (NC2), the classifier's
weights align with them (NC3), and it decides for the nearest mean (NC4).

Papyan, Han and Donoho 2020, arXiv:2008.08186. All are 0 at collapse. K counts the classes of which
the probe has samples; each counts alike, however many these are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.jackknife import delete_one_error, parts_of
from nettrace.last_layer import LastLayer
from nettrace.measures.registry import Value, measure

_SOURCE = "Papyan, Han and Donoho 2020, arXiv:2008.08186"
_ERROR = "error by leaving out groups of samples"
#: Below this share of the largest, singular values of the means are rounding.
_ROUNDING = 1e-10


@measure(
    "geometry/nc1_variability",
    needs=["last_layer", "classes"],
    convention="tr(S_W S_B^+) / K, with S_B the covariance of the K means of classes, S_W that of "
    f"features around them, K classes weighted alike; {_ERROR}",
    source=f"{_SOURCE}, fig. 6",
)
def nc1_variability(last_layer: LastLayer, classes: Tensor) -> Value:
    """How far features vary within classes, against how far these are apart."""

    def variability(seen: _Seen) -> Tensor:
        if not bool(seen.means.abs().max() > _ROUNDING * seen.rows.abs().max()):
            raise ValueError("the means of all classes are the same: features tell nothing of them")
        # The pseudo-inverse of S_B = M^T M / K is K M^+ M^+^T.
        inverse = torch.linalg.pinv(seen.means, rtol=_ROUNDING)
        own = (seen.share > 0).to(seen.rows.dtype) @ (seen.share.T @ seen.rows)
        within: Tensor = ((seen.rows - own) @ inverse).square().sum(1)
        return (seen.share.T @ within).mean()

    return _of_classes(last_layer.features, classes, variability)


@measure(
    "geometry/nc2_equinorm",
    needs=["last_layer", "classes"],
    convention=f"std over classes of |mu_k - mu_G| over its mean; {_ERROR}",
    source=f"{_SOURCE}, fig. 2",
)
def nc2_equinorm(last_layer: LastLayer, classes: Tensor) -> Value:
    """How far the means of classes differ in length."""
    return _of_classes(
        last_layer.features, classes, lambda seen: seen.norms.std(correction=0) / seen.norms.mean()
    )


@measure(
    "geometry/nc2_equiangular",
    needs=["last_layer", "classes"],
    convention=f"std over pairs of classes of the cosine of mu_k - mu_G and mu_l - mu_G; {_ERROR}",
    source=f"{_SOURCE}, fig. 3",
)
def nc2_equiangular(last_layer: LastLayer, classes: Tensor) -> Value:
    """How far the angles between means of classes differ."""
    return _of_classes(last_layer.features, classes, lambda seen: seen.cosines.std(correction=0))


@measure(
    "geometry/nc2_maximal_angle",
    needs=["last_layer", "classes"],
    convention="mean over pairs of classes of |cosine + 1 / (K - 1)|, that of mu_k - mu_G and "
    f"mu_l - mu_G; {_ERROR}",
    source=f"{_SOURCE}, fig. 4",
)
def nc2_maximal_angle(last_layer: LastLayer, classes: Tensor) -> Value:
    """How far the angles between means of classes are from the widest possible."""
    widest = 1 / (len(classes.unique()) - 1 or 1)
    return _of_classes(
        last_layer.features, classes, lambda seen: (seen.cosines + widest).abs().mean()
    )


@measure(
    "geometry/nc3_self_duality",
    needs=["last_layer", "classes"],
    convention="|W / |W|_F - M / |M|_F|_F^2, W the last layer's weights and M the rows mu_k - mu_G "
    f"of the classes, in [0, 4]; {_ERROR}",
    source=f"{_SOURCE}, fig. 5",
)
def nc3_self_duality(last_layer: LastLayer, classes: Tensor) -> Value:
    """How far the classifier's weights are from the means of the classes."""
    labels, head_weight = classes.unique(), last_layer.weight.detach()
    if int(labels.max()) >= len(head_weight) or int(labels.min()) < 0:
        raise ValueError(
            f"expected classes from 0 to {len(head_weight) - 1}, one for each of the last layer's "
            f"outputs, got {int(labels.min())} to {int(labels.max())}"
        )
    weight = head_weight[labels].double()
    if not bool(weight.any()):
        raise ValueError("the last layer's weights are all zero: they point nowhere")

    def apart(seen: _Seen) -> Tensor:
        gap: Tensor = weight / weight.norm() - seen.means / seen.norms.norm()
        return gap.square().sum()

    return _of_classes(last_layer.features, classes, apart)


@measure(
    "geometry/nc4_nearest_mean",
    needs=["last_layer", "classes"],
    convention="share of samples that the network and the nearest mean of a class, of those that "
    f"the probe has, decide for different classes; {_ERROR}",
    source=f"{_SOURCE}, fig. 7",
)
def nc4_nearest_mean(last_layer: LastLayer, classes: Tensor) -> Value:
    """How often the network does not decide for the nearest mean of a class."""
    seen = _seen(last_layer.features, classes)
    labels = classes.unique()
    nearest = labels[torch.cdist(seen.rows, seen.share.T @ seen.rows).argmin(1)]
    return Value.mean((nearest != last_layer.outputs.argmax(1)).double())


@dataclass(frozen=True)
class _Seen:
    """Features, and what is made of them.

    Args:
        rows: (N, d) features.
        share: (N, K) that each has in the mean of each class.
        means: (K, d) of classes, less their own mean.
    """

    rows: Tensor
    share: Tensor
    means: Tensor

    @property
    def norms(self) -> Tensor:
        """(K,) of the means."""
        norms: Tensor = torch.linalg.vector_norm(self.means, dim=1)
        if not bool((norms > _ROUNDING * self.rows.abs().max()).all()):
            raise ValueError(
                "the mean of a class is that of all classes: features do not tell it from others"
            )
        return norms

    @property
    def cosines(self) -> Tensor:
        """(K (K - 1) / 2,) of the angles between the means."""
        unit = self.means / self.norms[:, None]
        one, other = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
        cosines: Tensor = (unit[one] * unit[other]).sum(1)
        return cosines


def _of_classes(features: Tensor, classes: Tensor, function: Callable[[_Seen], Tensor]) -> Value:
    """A function of features, and its standard error, where each class has a sample to spare."""
    value = function(_seen(features, classes))
    parts = [part.to(classes.device) for part in parts_of(len(classes))]
    count = len(classes.unique())
    if any(len(classes[part].unique()) < count for part in parts):
        return Value(value)
    without = torch.stack([function(_seen(features[part], classes[part])) for part in parts])
    return Value(value, delete_one_error(without))


def _seen(features: Tensor, classes: Tensor) -> _Seen:
    """Features by class.

    Raises:
        ValueError: if there are not two classes, or numbers that are not finite.
    """
    if not bool(features.isfinite().all()):
        raise ValueError("the features are not finite: the training diverges, or the probe is not")
    labels = classes.unique()
    if len(labels) < 2:
        raise ValueError(
            f"neural collapse is of two classes or more, the probe has {len(labels)}: take samples "
            "of several"
        )
    if len(features) != len(classes) or features.dim() != 2:
        raise ValueError(
            f"expected features (N, d) of {len(classes)} samples, got {tuple(features.shape)}: "
            "neural collapse is of networks with one class a sample"
        )
    rows = features.double()
    within = (classes[:, None] == labels).double()
    share = within / within.sum(0)
    means = share.T @ rows
    return _Seen(rows, share, means - means.mean(0))
