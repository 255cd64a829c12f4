"""Weights fit a network by name and shape, or it is said why they do not."""

import pytest
import torch
from saving import network, quietly, same
from torch import nn
from torch.optim.swa_utils import AveragedModel

import nettrace as nt
from nettrace.checkpoints import CheckpointError, restore


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["", "model.", "net.", "module.", "_orig_mod.", "_forward_module.", "a.b.c."]
)
@pytest.mark.parametrize("inside", ["", "net.", "model.net."])
def test_prefixes_are_taken_off_and_put_on(prefix, inside):
    state, model = network().state_dict(), network()
    target = model
    for name in reversed(inside.split(".")[:-1]):
        target = Holder(**{name: target})
    restore(target, prefixed(prefix, state))
    assert same(model.state_dict(), state)


def test_wrappers_anywhere_in_names_do_not_matter():
    state, model = network().state_dict(), network()
    within = {
        n.replace("0.", "0._orig_mod.").replace("3.", "_fsdp_wrapped_module.3."): v
        for n, v in state.items()
    }
    restore(model, prefixed("module._checkpoint_wrapped_module.", within))
    assert same(model.state_dict(), state)
    compiled = torch.compile(network(), backend="eager")
    restore(compiled, state)
    assert same(compiled._orig_mod.state_dict(), state)


def test_an_averaged_model_fits_the_plain_network():
    model, averaged = network(), AveragedModel(network())
    averaged.update_parameters(network())
    restore(model, averaged.state_dict())
    assert same(model.state_dict(), averaged.module.state_dict())
    again = AveragedModel(network())
    restore(again, averaged.state_dict())
    assert same(again.state_dict(), averaged.state_dict())


def test_two_entries_are_not_taken_for_one():
    state = network().state_dict()
    state["_orig_mod.0.bias"] = state["0.bias"] + 1
    with pytest.raises(CheckpointError, match=r"network lacks"):
        restore(network(), state)


def test_a_part_of_the_network_is_not_enough():
    with pytest.raises(CheckpointError, match=r"lacks [ab]\.0\.weight"):
        restore(Holder(a=network(), b=network()), network().state_dict())
    with pytest.raises(CheckpointError, match=r"network lacks b\.0\.weight"):
        restore(network(), Holder(a=network(), b=network()).state_dict())
    twice, state = network(), network().state_dict()
    restore(Holder(a=twice, b=twice), state)
    assert same(twice.state_dict(), state)


def test_tied_weights_need_to_be_there_once():
    model, value = Tied(), torch.randn(7, 4)
    for state in ({"embedding.weight": value}, {"head.weight": value}):
        restore(model, state)
        assert torch.equal(model.head.weight, value)
        assert model.head.weight is model.embedding.weight
    restore(model, {"embedding.weight": value + 1, "head.weight": value + 1})
    assert torch.equal(model.head.weight, value + 1)
    with pytest.raises(CheckpointError, match=r"differs from embedding.weight"):
        restore(model, {"embedding.weight": value, "head.weight": value + 1})
    restore(Holder(model=model), {"embedding.weight": value})
    assert torch.equal(model.head.weight, value)


def test_lazy_modules_take_shapes_from_the_checkpoint():
    model, state = nn.Sequential(quietly(nn.LazyLinear, 4), nn.Linear(4, 2)), None
    full = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    state = full.state_dict()
    restore(model, state)
    inputs = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(model(inputs), full(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_keep_the_type_in_which_they_were_saved(dtype):
    built = Holder(net=network())
    built.register_buffer("scale", torch.ones(2) / 3, persistent=False)
    built.register_buffer("rotation", torch.ones(2) * 1j, persistent=False)
    original = network().to(dtype)
    before = {n: p for n, p in built.named_parameters()}
    restore(built, original.state_dict())
    assert all(p is before[n] for n, p in built.named_parameters())
    assert all(p.requires_grad for p in built.parameters())
    assert same(built.net.state_dict(), original.state_dict())
    assert built.scale.dtype == dtype
    assert built.rotation.dtype == torch.complex64
    assert built.net[1].num_batches_tracked.dtype == torch.int64
    inputs = torch.randn(6, 5).to(dtype)
    assert torch.equal(built.net(inputs), original(inputs))


@pytest.mark.parametrize(
    ("saved", "given"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("forward", [None, lambda model, inputs: model(inputs)])
def test_inputs_of_another_type_than_the_weights_are_an_error_that_says_so(saved, given, forward):
    model = nn.Linear(5, 3)
    restore(model, nn.Linear(5, 3).to(saved).state_dict())
    probe = nt.Probe(torch.ones(4, 5, dtype=given), forward=forward)
    says = rf"Linear has weights of {saved}, the probe inputs of {given}.*give inputs of {saved}"
    with pytest.raises(TypeError, match=says):
        nt.Tracer(probe, ["ntk/trace"]).certify(model)


def test_types_may_differ_from_weight_to_weight():
    original, model = network(), network()
    original[0].double()
    restore(model, original.state_dict())
    dtypes = [p.dtype for p in model.parameters()]
    assert dtypes == [p.dtype for p in original.parameters()]
    assert same(model.state_dict(), original.state_dict())


def test_what_does_not_fit_is_named_with_shapes():
    state = network().state_dict()
    del state["0.bias"]
    state["extra.weight"] = torch.ones(2)
    state["3.weight"] = torch.ones(2, 4)
    with pytest.raises(CheckpointError) as error:
        restore(network(), state)
    for text in ("Sequential", "lacks 0.bias", "lacks extra.weight", "(2, 4)", "(3, 4)", "--model"):
        assert text in str(error.value)
    for text in ("nettrace.checkpoints.restore(", "nettrace.checkpoints.load("):
        assert text in str(error.value)
    quantised = {k: (v * 100).to(torch.int8) for k, v in network().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of torch.int8"):
        restore(network(), quantised)
    with pytest.raises(CheckpointError):
        restore(network(), {})


def test_hooks_of_the_network_may_rename():
    old = quietly(nn.utils.weight_norm, nn.Linear(3, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    restore(new, old.state_dict())
    inputs = torch.randn(4, 3)
    torch.testing.assert_close(new(inputs), old(inputs))


def test_batch_norms_from_before_batches_were_counted():
    state, model = network().state_dict(), network()
    del state["1.num_batches_tracked"]
    state._metadata["1"]["version"] = 1
    restore(model, state)
    assert same(model.state_dict(), {**state, "1.num_batches_tracked": torch.tensor(0)})
