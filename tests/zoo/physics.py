"""Models of physics: equations in the loss, operators, potentials, solvers, quantum states."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.member import N, member, singles_of


def slope(y: Tensor, x: Tensor) -> Tensor:
    """The derivative of each sample's y by its own x, itself differentiable."""
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return found


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


# Equations and operators ------------------------------------------------------------------------


@member("pinn", "W1", lambda: torch.rand(N, 2))
class Burgers(nn.Module):
    """A residual with second derivatives by the input, and an unknown constant of nature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 6, 6, 1)
        self.viscosity = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)[:, 0]
        u_x, u_t = slope(u, x).unbind(1)
        residual = u_t + u * u_x - self.viscosity * slope(u_x, x)[:, 0]
        return torch.stack([residual, u], 1)


@member("pinn-attention", "W1", lambda: torch.rand(N, 2))
class PINNsFormer(nn.Module):
    """Attention over a short sequence of times inside the residual: derived twice, then again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.mix = nn.Linear(4, 12)
        self.wave = nn.Parameter(torch.tensor([1.0, 0.7]))
        self.head = mlp(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        steps = torch.arange(3, dtype=x.dtype)[:, None] * x.new_tensor([0.0, 0.1])
        h = self.embed(x[:, None] + steps)
        h = self.wave[0] * h.sin() + self.wave[1] * h.cos()
        q, k, v = self.mix(h).chunk(3, -1)
        with sdpa_kernel(SDPBackend.MATH):
            u = self.head(h + F.scaled_dot_product_attention(q, k, v)).sum((1, 2))
        u_x, u_t = slope(u, x).unbind(1)
        return torch.stack([slope(u_t, x)[:, 1] - slope(u_x, x)[:, 0], u], 1)


@member("fourier", "W2", lambda: torch.randn(N, 2, 8))
class Fourier(nn.Module):
    """Complex weights between a Fourier transform and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.cfloat))
        self.mix = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))
        self.head = nn.Linear(3 * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :4]
        modes = torch.einsum("nik,iok->nok", modes, self.weight)
        modes = (modes.mT @ self.mix).mT
        return self.head(torch.tanh(torch.fft.irfft(modes, n=8)).flatten(1))


@member("deeponet", "W2", lambda: torch.randn(N, 5))
class DeepONet(nn.Module):
    """The trunk sees a grid but no sample: a weight of many layers, as long as the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(5, 6, 4), mlp(1, 6, 4)
        self.register_buffer("grid", torch.linspace(0, 1, 2 * N)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) @ self.trunk(self.grid).T


# Particles --------------------------------------------------------------------------------------


@member(
    "graphs",
    "W3",
    lambda: (
        torch.randn(sum(Graphs.sizes), 3),
        torch.arange(N).repeat_interleave(torch.tensor(Graphs.sizes)),
    ),
    singles=singles_of(1),
)
class Graphs(nn.Module):
    """Message passing on one batched graph; the samples are the graphs, of different sizes."""

    sizes = (3, 5, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(3, 6)
        self.update = nn.Linear(6, 6)
        self.read = nn.Linear(6, 2)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        edges = graph[:, None] == graph[None, :]
        h = torch.tanh(self.message(x))
        h = torch.tanh(self.update(edges.to(x.dtype) @ h))
        pooled = h.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, h)
        return self.read(pooled)


@member(
    "particles",
    "W3",
    lambda: (
        torch.randn(sum(Particles.sizes), 2),
        torch.arange(N).repeat_interleave(torch.tensor(Particles.sizes)),
    ),
    singles=singles_of(1),
)
class Particles(nn.Module):
    """Messages gathered and scattered along edges in random order, gated updates, two rounds."""

    sizes = (3, 1, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(2, 5)
        self.message = mlp(10, 6, 5, activation=nn.SiLU)
        self.update = nn.GRUCell(5, 5)
        self.read = nn.Linear(5, 2)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        sender, receiver = (graph[:, None] == graph).nonzero().T
        order = torch.randperm(len(sender), generator=torch.Generator().manual_seed(0))
        sender, receiver = sender[order], receiver[order]
        h = torch.tanh(self.encode(x))
        for _ in range(2):
            m = self.message(torch.cat([h[sender], h[receiver]], 1))
            h = self.update(torch.zeros_like(h).index_add(0, receiver, m), h)
        pooled = h.new_zeros(int(graph.max()) + 1, 5).scatter_reduce(
            0, graph[:, None].expand_as(h), h, "mean", include_self=False
        )
        return self.read(pooled)


@member("sparse-graph", "W3", lambda: torch.randn(N, 6, 3))
class SparseGraph(nn.Module):
    """A sparse adjacency matrix of the merged batch, and an embedding of each kind of node."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, 3)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, k, _ = x.shape
        ring = torch.eye(k, dtype=x.dtype).roll(1, 0)
        adjacency = torch.block_diag(*[ring + 0.5 * ring.T] * n).to_sparse()
        h = (x + self.kinds(torch.arange(k) % 2)).flatten(0, 1)
        h = torch.tanh(torch.sparse.mm(adjacency, self.first(h)))
        return torch.sparse.mm(adjacency, self.second(h)).view(n, k, 2).square().mean(1)


@member("forces", "W4", lambda: torch.randn(N, 3))
class Forces(nn.Module):
    """The output is a gradient with respect to the input, as for atomic forces and PINNs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU())
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.head(self.net(x))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, -force], 1)


@member("potential", "W4", lambda: torch.randn(N, 3, 3))
class Potential(nn.Module):
    """Energy and forces of atoms from radial functions with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(0.5, 3, 4))
        self.widths = nn.Parameter(torch.ones(4))
        self.element = nn.Embedding(2, 4)
        self.pair = mlp(4, 5, 1, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
        distance = (x[:, i] - x[:, j]).norm(dim=-1, keepdim=True)
        radial = torch.exp(-self.widths * (distance - self.centres) ** 2)
        species = self.element(torch.tensor([0, 1, 1]))
        energy = self.pair(radial * (species[i] + species[j])).sum((1, 2))
        return torch.cat([energy[:, None], -slope(energy, x).flatten(1)], 1)


@member("equivariant", "W4", lambda: torch.randn(N, 4, 3))
class Equivariant(nn.Module):
    """Invariant messages move the coordinates, so that later messages depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.move = mlp(1, 5, 3), mlp(3, 4, 1)
        self.node = mlp(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            r = x[:, :, None] - x[:, None]
            m = self.edge(r.square().sum(-1, keepdim=True))
            x = x + (r * self.move(m)).mean(2)
        return torch.cat([x[:, 0], self.node(m.sum(2)).sum(1)], 1)


# Unrolled in time -------------------------------------------------------------------------------


@member("rollout", "W5", lambda: torch.randn(N, 1, 8))
class Rollout(nn.Module):
    """A surrogate of a partial differential equation feeds on its own predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.stencil = nn.Conv1d(1, 4, 3, padding=1, padding_mode="circular")
        self.flux = nn.Conv1d(4, 1, 3, padding=1, padding_mode="circular")
        self.dt = nn.Parameter(torch.tensor(0.3))

    def forward(self, u: Tensor) -> Tensor:
        frames = []
        for _ in range(3):
            u = u + self.dt * self.flux(torch.tanh(self.stencil(u)))
            frames.append(u.square().mean((1, 2)))
        return torch.stack(frames, 1)


@member("neural-ode", "W6", lambda: torch.randn(N, 2))
class NeuralODE(nn.Module):
    """Runge-Kutta steps of fourth order through a field that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        self.field = mlp(3, 5, 2)

    def rate(self, t: float, y: Tensor) -> Tensor:
        return self.field(torch.cat([y, y.new_full((len(y), 1), t)], 1))

    def forward(self, y: Tensor) -> Tensor:
        h = 0.25
        for step in range(3):
            t = step * h
            k1 = self.rate(t, y)
            k2 = self.rate(t + h / 2, y + h / 2 * k1)
            k3 = self.rate(t + h / 2, y + h / 2 * k2)
            k4 = self.rate(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


@member("neural-sde", "W6", lambda: torch.randn(N, 2), alone=False)
class NeuralSDE(nn.Module):
    """Euler-Maruyama steps whose noise is drawn in the forward pass and multiplied by a network."""

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.diffusion = mlp(2, 4, 2), mlp(2, 4, 2)

    def forward(self, y: Tensor) -> Tensor:
        for _ in range(3):
            noise = torch.randn_like(y) * 0.3
            y = y + 0.1 * self.drift(y) + F.softplus(self.diffusion(y)) * noise
        return y


class Equilibrium(torch.autograd.Function):
    """z = tanh(z W + x), with the gradient of the implicit-function theorem."""

    @staticmethod
    def forward(ctx, weight, x):
        z = torch.zeros_like(x)
        for _ in range(80):
            z = torch.tanh(z @ weight + x)
        ctx.save_for_backward(weight, z)
        return z

    @staticmethod
    def backward(ctx, g):
        weight, z = ctx.saved_tensors
        u = torch.zeros_like(g)
        for _ in range(80):
            u = (g + u @ weight.T) * (1 - z * z)
        return z.T @ u, u


@member("equilibrium", "W7 W6", lambda: torch.randn(N, 3), "rule node")
class DeepEquilibrium(nn.Module):
    """A fixed point in a custom function; then one found without a tape and mended by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) * 0.1)
        self.into, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)
        nn.init.normal_(self.inner.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = Equilibrium.apply(self.weight, self.into(x))
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(80):
                z = torch.tanh(self.inner(z) + x)
        start = z.requires_grad_()
        z = torch.tanh(self.inner(start) + x)

        def adjoint(g: Tensor) -> Tensor:
            u = g
            for _ in range(80):
                (back,) = torch.autograd.grad(once, start, u, retain_graph=True)
                u = g + back
            return u

        once = torch.tanh(self.inner(start) + x.detach())
        z.register_hook(adjoint)
        return z


@member("linear-solve", "W7 W8", lambda: torch.randn(N, 3, 2), "rule node")
class Solve(nn.Module):
    """An implicit layer: one matrix of parameters against all right-hand sides of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3) + 3 * torch.eye(3))
        self.into = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.linalg.solve(self.matrix, torch.tanh(self.into(x)))
        stiffness = torch.eye(3, dtype=x.dtype) * 3 + torch.einsum("nik,njk->nij", x, x)
        return torch.linalg.solve(stiffness + self.matrix, y).sum(2)


@member("experts", "W7", lambda: torch.randn(N, 5, 4))
class GatheredExperts(nn.Module):
    """Each token gathers the weights of its two best experts: the weights are rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.bias = nn.Parameter(torch.randn(3, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 2))

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = self.gate(x).softmax(-1).topk(2)
        h = torch.einsum("nti,nteih->nteh", x, self.up[chosen]) + self.bias[chosen]
        y = torch.einsum("nteh,nteho->nteo", torch.tanh(h), self.down[chosen])
        return (y * score.unsqueeze(-1)).sum(2).mean(1)


@member("dense-experts", "W7", lambda: torch.randn(N, 5, 4))
class DenseExperts(nn.Module):
    """All experts in one batched product, whose batch axis counts experts; then they are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.bias = nn.Parameter(torch.randn(3, 1, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1).expand(3, -1, -1)
        h = torch.tanh(torch.baddbmm(self.bias, tokens, self.up))
        y = torch.bmm(h, self.down).view(3, len(x), -1, 2)
        return torch.einsum("ento,nte->no", y, self.gate(x).softmax(-1))


@member("simulator", "W8", lambda: torch.randn(N, 2))
class Simulator(nn.Module):
    """A few constants of a mechanical system at the end of a long tape; no layer in sight."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(1.0))
        self.hardening = nn.Parameter(torch.tensor([0.3]))
        self.friction = nn.Parameter(torch.tensor(0.2))

    def forward(self, state: Tensor) -> Tensor:
        q, p = state.unbind(1)
        for _ in range(12):
            force = -self.stiffness * q - self.hardening * q**3
            p = torch.addcmul(p + 0.1 * force, self.friction, p, value=-0.1)
            q = q + 0.1 * p
        return torch.stack([q, p], 1)


@member("closure", "W8", lambda: torch.randn(N, 8))
class SpectralClosure(nn.Module):
    """A network corrects a pseudo-spectral solver at every step, in Fourier space."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv1d(1, 3, 3, padding=1, padding_mode="circular")
        self.filter = nn.Parameter(torch.ones(5))

    def forward(self, u: Tensor) -> Tensor:
        k = torch.arange(5, dtype=u.dtype)
        for _ in range(2):
            flux = torch.fft.rfft(u * u / 2 + torch.tanh(self.net(u[:, None])).sum(1))
            modes = torch.fft.rfft(u) - 0.05 * 1j * k * flux * self.filter
            u = torch.fft.irfft(modes / (1 + 0.01 * k * k), n=8)
        return u[:, :3]


# Quantum ----------------------------------------------------------------------------------------


@member("quantum-circuit", "W16", lambda: torch.randn(N, 3))
class Circuit(nn.Module):
    """Gates with trained angles act on a complex state; the data enter again in each layer."""

    def __init__(self, qubits: int = 3) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(2, qubits, 2))

    @staticmethod
    def gate(state: Tensor, qubit: int, y: Tensor, z: Tensor) -> Tensor:
        """Rotations by y and then z of one qubit; angles are numbers or one a sample."""
        c, s = torch.cos(y / 2), torch.sin(y / 2)
        phase = torch.exp(0.5j * z)
        unitary = torch.stack([c / phase, -s / phase, s * phase, c * phase], -1)
        unitary = unitary.unflatten(-1, (2, 2))
        state = state.movedim(1 + qubit, -1)
        subscripts = "ij,nabj->nabi" if unitary.dim() == 2 else "nij,nabj->nabi"
        return torch.einsum(subscripts, unitary, state).movedim(-1, 1 + qubit)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 2, 2, 2, dtype=x.dtype.to_complex())
        state[:, 0, 0, 0] = 1
        signs = x.new_tensor([1.0, -1.0])
        flips = torch.ones(2, 2, dtype=x.dtype)
        flips[1, 1] = -1  # a controlled phase between the last two qubits
        for layer in self.angles:
            for q, (y, z) in enumerate(layer):
                state = self.gate(state, q, x[:, q], x[:, q])
                state = self.gate(state, q, y, z)
            state = state * flips
        p = state.abs().square()
        return torch.stack([(p.sum((2, 3)) @ signs), (p.sum((1, 2)) @ signs)], 1)


@member("neural-quantum-state", "W17", lambda: torch.randint(0, 2, (N, 5)) * 2.0 - 1)
class BoltzmannState(nn.Module):
    """The complex logarithm of an amplitude, with complex weights, seen as two reals."""

    def __init__(self) -> None:
        super().__init__()
        self.visible = nn.Parameter(torch.randn(5, dtype=torch.cfloat) * 0.3)
        self.hidden = nn.Linear(5, 4, dtype=torch.cfloat)

    def forward(self, spins: Tensor) -> Tensor:
        spins = spins.to(self.visible.dtype)
        theta = self.hidden(spins)
        return torch.view_as_real(spins @ self.visible + torch.log(2 * torch.cosh(theta)).sum(1))


@member("matrix-product-state", "W17", lambda: torch.randint(0, 2, (N, 4)))
class BornMachine(nn.Module):
    """Site tensors chosen by the sample; the norm of the state is a weight without a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ParameterList(torch.randn(2, 3, 3) for _ in range(4))

    def forward(self, spins: Tensor) -> Tensor:
        left = torch.eye(3, dtype=self.sites[0].dtype)[:1].expand(len(spins), 1, 3)
        norm = left[:1].mT @ left[:1]
        for site, spin in zip(self.sites, spins.T, strict=True):
            left = left @ site[spin]
            norm = torch.einsum("bij,sik,sjl->bkl", norm, site, site)
        amplitude = left[:, 0, 0]
        return torch.stack([amplitude.square().log() - norm[0, 0, 0].log(), amplitude], 1)
