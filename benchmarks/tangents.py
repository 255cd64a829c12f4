"""How neural-tangents computes each quantity, in an environment of its own with an older jax.

    python benchmarks/tangents.py FOLDER

writes the kernels of the LeNet in `FOLDER/network.npz` to `FOLDER/kernels.npz`, for `schools.py`.
It takes functions of jax rather than modules, so the networks are written again here; their weights
and inputs are those of `workloads`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from jax import Array, lax

Parameters = list[Array]


def mlp(p: Parameters, x: Array) -> Array:
    for w, b in zip(p[:-2:2], p[1:-2:2], strict=True):
        x = jax.nn.relu(x @ w.T + b)
    return x @ p[-2].T + p[-1]


def lenet(p: Parameters, x: Array) -> Array:
    for w, b in zip(p[:4:2], p[1:4:2], strict=True):
        x = lax.conv_general_dilated(x, w, (1, 1), [(2, 2), (2, 2)]) + b[:, None, None]
        window = (1, 1, 2, 2)
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, window, window, "VALID")
    return mlp(p[4:], x.reshape(len(x), -1))


#: By workload, with the implementation that is fastest there.
NETWORKS = {
    "mlp": (mlp, nt.NtkImplementation.NTK_VECTOR_PRODUCTS),
    "lenet": (lenet, nt.NtkImplementation.JACOBIAN_CONTRACTION),
}


def prepare(
    workload: str, quantity: str, data: Mapping[str, np.ndarray]
) -> Callable[[], dict[str, Array]] | None:
    """What is timed after one call to compile; None for a network that is not written here."""
    if workload not in NETWORKS:
        return None
    x = jnp.asarray(data["inputs"])
    parameters = [jnp.asarray(data[f"parameter {i}"]) for i in range(len(data["names"]))]
    network, implementation = NETWORKS[workload]
    traced = quantity == "traces"
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            network,
            trace_axes=(-1,) if traced else (),
            diagonal_axes=(0,) if traced else (),
            vmap_axes=0,
            implementation=implementation,
        )
    )

    def call() -> dict[str, Array]:
        found = kernel(x, None, parameters).block_until_ready()
        if traced:
            return {"ntk_trace": 10 * found.sum()}  # a mean over the outputs
        return {"ntk": found.transpose(0, 2, 1, 3)}  # (N, N, C, C)

    return call


def main() -> None:
    folder = Path(sys.argv[1])
    data = np.load(folder / "network.npz")
    parameters = [jnp.asarray(data[name]) for name in data["names"]]
    kernels = {
        name: nt.empirical_ntk_fn(lenet, trace_axes=axes, vmap_axes=0)(
            jnp.asarray(data["inputs"]), None, parameters
        )
        for name, axes in {"traced": (-1,), "full": ()}.items()
    }
    np.savez(folder / "kernels.npz", **{name: np.asarray(k) for name, k in kernels.items()})


if __name__ == "__main__":
    main()
