"""Per-sample gradients by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nettrace.gradients import Gradients, Layer, Pulled, reals, written_out
from nettrace.kernels import Dense, Factor


class RowGradients(Gradients):
    """Gradients by one backward pass a row, which is defined for coupled samples too."""

    def layers(self, apart: bool) -> list[Layer]:
        """All parameters, one by one."""
        return [(name,) for name in self.parameters]

    def coverage(self) -> dict[str, str]:
        """All "rows"."""
        return dict.fromkeys(self.parameters, "rows")

    def pull(self, cotangents: Tensor, layers: Sequence[Layer]) -> Pulled:
        """The rows (K, N, P) of each parameter."""
        rows: dict[str, list[Tensor]] = {name: [] for (name,) in layers}
        for cotangent in cotangents:
            for n in range(len(cotangent)):
                one = torch.zeros_like(cotangent)
                one[n] = cotangent[n]
                gradients = self.backward(one)
                for name, found in rows.items():
                    found.append(written_out(gradients[name].flatten(), self.dtype))
        count = len(cotangents)
        return {name: torch.stack(r).unflatten(0, (count, -1)) for name, r in rows.items()}

    def bytes_per_cotangent(self, layers: Sequence[Layer]) -> int:
        """N rows."""
        columns = sum(reals(self.parameters[name]) for (name,) in layers)
        return len(self.outputs) * columns * self.dtype.itemsize

    def factor(
        self, layer: Layer, pulled: Pulled, samples: slice, oriented: bool = False
    ) -> Factor:
        """The rows."""
        return Dense(pulled[layer[0]][:, samples])

    def is_written_out(self, layer: Layer) -> bool:
        """The rows are there already."""
        return False
