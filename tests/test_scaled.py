"""The Jacobian with scaled columns, against written-out matrices over the zoo."""

import oracle
import pytest
import torch
import zoo

import nettrace as nt

MEMBERS = "mlp cnn gpt recurrent shared no-rule bags in-place low-rank complex".split()


def flat(tensors):
    """Real vectors, (P,)."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # of old parts of torch
@pytest.mark.parametrize("budget", ["2GiB", 200_000], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", MEMBERS)
def test_scaled_columns_are_those_of_the_written_out_matrix(name, budget):
    member = zoo.build(name)
    outputs = member.forward(member.model, member.batch)
    parameters = member.parameters
    w = {n: torch.rand_like(p) + (0.5j if p.is_complex() else 0) for n, p in parameters.items()}
    j = torch.cat(list(oracle.jacobian(outputs, parameters).values()), 2) * flat(w.values())
    found = nt.jacobian(outputs, member.target, memory_budget=budget).scaled(w)
    u, v = torch.randn(j.shape[2]).to(j), torch.randn(j.shape[:2]).to(j)
    cotangents = torch.randn(2, *j.shape[:2]).to(j)
    projected = torch.einsum("knc,ncp->nkp", cotangents, j)
    gram = oracle.gram(j)
    pairs = {
        "gram": (found.gram(), gram),
        "traced": (found.gram(trace_outputs=True), torch.einsum("ncp,mcp->nm", j, j)),
        "blocks": (found.blocks(), torch.einsum("ncp,ndp->ncd", j, j)),
        "norms": (found.norms(), j.norm(dim=2)),
        "jvp": (found.jvp(u), j @ u),
        "vjp": (found.vjp(v), torch.einsum("nc,ncp->p", v, j)),
        "product": (found.gram_product(v), torch.einsum("ncmd,md->nc", gram, v)),
        "rows": (found.rows(1), j[1]),
        "projected": (found.project(cotangents).norms(), projected.norm(dim=2)),
        "twice": (found.scaled(w).norms(), (j * flat(w.values())).norm(dim=2)),
    }
    for what, (value, true) in pairs.items():
        assert oracle.relative_error(value, true) < 1e-10, what
    layers = found.gram(per_layer=True)
    assert oracle.relative_error(sum(layers.values()), gram) < 1e-10
    exact = float(j.square().sum())
    estimate = found.estimate_trace("xtrace", probes=j.shape[0] * j.shape[1])
    assert float(estimate.value) == pytest.approx(exact, rel=1e-6)


def test_weights_of_wrong_names_or_shapes_are_refused():
    model = torch.nn.Linear(3, 2)
    jacobian = nt.jacobian(model(torch.randn(4, 3)), model)
    weights = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"entries for \['other'\]"):
        jacobian.scaled({**weights, "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected u\['bias'\] of shape \(2,\), got \(1,\)"):
        jacobian.scaled({**weights, "bias": torch.ones(1)})
