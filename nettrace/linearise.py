"""A network linearised in its weights, around weights that it had before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nettrace.differentiate import jacobian
from nettrace.estimators import signs
from nettrace.probe import Probe
from nettrace.products import Pushforward


def linearised(
    model: nn.Module,
    probe: Probe,
    state: Mapping[str, Tensor],
    outputs: Tensor,
    memory_budget: int | str = "2GiB",
) -> Tensor:
    """f_0 + J_0 (theta - theta_0), in the outputs' shape, for the network's weights theta.

    The network is evaluated once more, with its former weights theta_0, and the product taken by a
    backward pass through the backward pass, or else by one an output. Memory: beside that, twice
    that of the weights for the moment.

    Args:
        model: the network; it is left as it is, and so is any tape of it.
        probe: the samples.
        state: the former parameters and buffers, by name.
        outputs: f_0, as they were found with those.
        memory_budget: as in `nettrace.jacobian`.

    Raises:
        ValueError: if parameters or buffers have other names or shapes now, or the network's
            outputs with its former ones are not what they were.
    """
    with put_in_place(model, state) as now:
        moved = {
            name: p.requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad or not torch.equal(p, now[name])
        }
        again = probe.look(model)
        _check_same(again.detach(), outputs)
        derivatives = jacobian(again, moved, memory_budget=memory_budget)
        shift = {name: now[name] - p.detach() for name, p in moved.items()}
        v = signs((derivatives.samples, derivatives.outputs), 0, "check")
        product = Pushforward(derivatives, v)(shift)
        product = derivatives.jvp(shift) if product is None else product
    return outputs + product.detach().view_as(outputs)


@contextmanager
def put_in_place(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Gives a network copies of other parameters and buffers, and then its own again.

    Parameters stay the same objects, wherever modules refer to them; a tape that was recorded
    before is valid again afterwards.

    Yields:
        The values of its own parameters, by name.

    Raises:
        ValueError: if `state` has other names or shapes.
    """
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    shapes = {name: tuple(t.shape) for name, t in {**parameters, **buffers}.items()}
    given = {name: tuple(t.shape) for name, t in state.items()}
    if shapes != given:
        differ = sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n))
        raise ValueError(
            f"the parameters or buffers {differ} are not those of the first look: a network is "
            "linearised around weights of its own names and shapes; begin a new trace"
        )
    # Copies, because a forward may write to either.
    twins = {id(b): state[name].to(b.device, copy=True) for name, b in buffers.items()}
    own = {name: (p.data, p.requires_grad) for name, p in parameters.items()}
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    holders = [(module._buffers, dict(module._buffers)) for module in modules]
    try:
        for name, p in parameters.items():
            p.data = state[name].to(p.device, copy=True)
        for holder, found in holders:
            holder.update({key: twins[id(b)] for key, b in found.items() if b is not None})
        yield {name: data for name, (data, _) in own.items()}
    finally:
        for name, p in parameters.items():
            p.data, requires_grad = own[name]
            p.requires_grad_(requires_grad)
        for holder, found in holders:
            holder.clear()
            holder.update(found)


def _check_same(found: Tensor, expected: Tensor) -> None:
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
    bound = 1e3 * torch.finfo(expected.dtype).eps * float(scale)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=bound):
        raise ValueError(
            "with the weights and buffers of the first look, the network no longer gives the "
            "outputs that it gave then: they depend on something else, such as random numbers or "
            "attributes that are no buffers; register those as buffers"
        )
