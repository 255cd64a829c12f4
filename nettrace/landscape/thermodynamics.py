"""What a density of states says of the network at any temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nettrace.landscape.multicanonical import jackknife
from nettrace.landscape.result import Quantity, dataset
from nettrace.missing import DoubtfulMeasureWarning, warn_missing
from nettrace.record import ERROR

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
#: The share of networks at the last energies that were counted from which on others are missed.
_EDGE = 0.01


def canonical(found: xr.Dataset, temperatures: Sequence[float]) -> xr.Dataset:
    """Averages over networks with probability proportional to exp(-E / T), by reweighting.

    Args:
        found: a density of states, as `density_of_states` gives it.
        temperatures: in units of the energy; negative ones favour high energies.

    Returns:
        A Dataset with dimension "temperature": "free_energy" F = -T ln Z, "energy" U,
        "heat_capacity" (<E^2> - U^2) / T^2, "entropy" (U - F) / T, and the average of each
        observable of `found`, all with standard errors by the jackknife over groups of walkers.
        Where S(E) is known up to a constant, so are F and the entropy. Temperatures at which
        energies count that were left out are named in `.doubts`.

    Raises:
        ValueError: if a temperature is 0 or not finite, or no density of states was found.
    """
    hot = np.asarray(temperatures, dtype=np.float64).reshape(-1)
    if not len(hot) or not (np.isfinite(hot) & (hot != 0)).all():
        raise ValueError(
            f"expected temperatures, one at least, finite and other than 0, got {hot.tolist()}"
        )
    (axis,) = found["entropy"].dims
    if not np.isfinite(found["entropy"].values).any():
        raise ValueError("no energy was seen: there is no density of states to reweight")
    energies = found[axis].values.astype(np.float64)
    # Of a density there is so much in each bin.
    log_width = np.log(found.attrs.get("bin_width", 1.0))
    names = [
        str(name)
        for name in found.data_vars
        if f"{name}_without" in found and name != "entropy" and not str(name).endswith(ERROR)
    ]

    def shares(entropy: Array) -> tuple[Array, Array, Array]:
        # One row a temperature.
        exponents = (
            np.where(np.isnan(entropy), -np.inf, entropy + log_width) - energies / hot[:, None]
        )
        log_z = np.logaddexp.reduce(exponents, axis=1)
        return exponents, log_z, np.exp(exponents - log_z[:, None])

    def averages(entropy: Array, observables: dict[str, Array]) -> dict[str, Array]:
        exponents, log_z, share = shares(entropy)
        mean = share @ energies
        spread = (share * (energies - mean[:, None]) ** 2).sum(1)
        there = np.exp(exponents.max(0) - exponents.max()) > 0
        return {
            "free_energy": -hot * log_z,
            "energy": mean,
            "heat_capacity": spread / hot**2,
            "entropy": log_z + mean / hot,
            **{n: share[:, there] @ np.nan_to_num(o[there]) for n, o in observables.items()},
        }

    whole = averages(found["entropy"].values, {n: found[n].values for n in names})
    without = [
        averages(
            found["entropy_without"].values[group],
            {n: found[f"{n}_without"].values[group] for n in names},
        )
        for group in range(found.sizes.get("group", 0))
    ]
    told = {
        "free_energy": "-T ln Z",
        "energy": "<E>",
        "heat_capacity": "(<E^2> - <E>^2) / T^2",
        "entropy": "(U - F) / T, in nats",
    }
    quantities = {}
    for name, value in whole.items():
        errors = jackknife(np.stack([one[name] for one in without])) if without else value * np.nan
        convention = told.get(name, f"{name}, averaged at T")
        quantities[name] = Quantity(value, ("temperature",), convention, errors)
    doubts = found.attrs["doubts"].splitlines()
    if "left_out" in found:
        counted = np.isfinite(found["entropy"].values)
        left, ends = energies[found["left_out"].values > 0], energies[counted][[0, -1]]
        _, _, share = shares(found["entropy"].values)
        cut = np.zeros(len(hot), dtype=bool)
        for end, beyond in zip(ends, ((left < ends[0]).any(), (left > ends[1]).any()), strict=True):
            cut |= beyond & (share[:, energies == end].sum(1) > _EDGE)
        if cut.any():
            doubts.append(
                f"at temperatures {hot[cut].min():g} to {hot[cut].max():g}, more than {_EDGE:.0%} "
                f"of the networks are at the end of the energies that were counted, {ends[0]:g} to "
                f"{ends[1]:g}: those beyond, which exist, are missing"
            )
            warn_missing(f"canonical: {doubts[-1]}", 2, DoubtfulMeasureWarning)
    return dataset(quantities, {"temperature": hot}, doubts=doubts)
