"""Models by what they learn and how: generators, energies, contrasts, custom layers, tasks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.member import N, member, singles_of
from zoo.physics import mlp, slope

# Generators and energies ------------------------------------------------------------------------


@member("diffusion", "W11", lambda: (torch.randn(N, 1, 8), torch.rand(N), torch.randn(N, 1, 8)))
class Denoiser(nn.Module):
    """Noise at a given time; the embedded time scales and shifts normalised channels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = mlp(4, 6, 8, activation=nn.SiLU)
        self.into, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.out = nn.Conv1d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        angle = t[:, None] * x.new_tensor([1.0, 10.0])
        scale, shift = self.time(torch.cat([angle.sin(), angle.cos()], 1))[..., None].chunk(2, 1)
        noisy = torch.cos(t)[:, None, None] * x + torch.sin(t)[:, None, None] * noise
        h = self.norm(self.into(noisy)) * (1 + scale) + shift
        return (self.out(F.silu(h)) - noise)[:, 0, :3]


@member("flow-matching", "W11", lambda: torch.randn(N, 2), alone=False)
class FlowMatching(nn.Module):
    """Time and noise are drawn inside the loss; velocity and score have heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.velocity, self.score = mlp(3, 6, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        t, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
        h = torch.tanh(self.trunk(torch.cat([t * x + (1 - t) * noise, t], 1)))
        loss = (self.velocity(h) - (x - noise)).square() + (self.score(h) + noise).square()
        return loss.mean(1)


@member("energy-model", "W12", lambda: torch.randn(N, 2), alone=False)
class EnergyModel(nn.Module):
    """Contrastive divergence: negative samples by Langevin steps, which have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        negative = x
        for _ in range(3):
            negative = negative.detach().requires_grad_()
            negative = negative - 0.5 * slope(self.net(negative), negative)
            negative = negative.detach() + 0.1 * torch.randn_like(x)
        real, fake = self.net(x)[:, 0], self.net(negative)[:, 0]
        return real - fake + 0.1 * (real**2 + fake**2)


@member("score-matching", "W12", lambda: torch.randn(N, 3))
class ScoreMatching(nn.Module):
    """The exact trace of the Hessian of an energy by its input, in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        score = slope(self.net(x), x)
        curvature = sum(slope(score[:, i], x)[:, i] for i in range(3))
        return curvature + score.square().sum(1) / 2


class Adversaries(nn.Module):
    """Two players with losses of their own; each is measured by its own parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp(2, 5, 3)
        self.critic = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(), nn.Linear(5, 1, bias=False))

    def generator_loss(self, x: Tensor, z: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(z)))[:, 0]

    def critic_loss(self, x: Tensor, z: Tensor) -> Tensor:
        fake = self.generator(z).detach()
        t = torch.sigmoid(x.sum(1, keepdim=True))
        middle = (t * x + (1 - t) * fake).requires_grad_()
        penalty = (slope(self.critic(middle), middle).norm(dim=1) - 1) ** 2
        return (self.critic(fake) - self.critic(x))[:, 0] + 10 * penalty


for player in ("generator", "critic"):
    member(
        f"gan-{player}",
        "W13",
        lambda: (torch.randn(N, 3), torch.randn(N, 2)),
        forward=lambda m, batch, player=player: getattr(m, f"{player}_loss")(*batch),
        of=lambda m, player=player: getattr(m, player),
    )(Adversaries)


@member("vae", "W14", lambda: torch.randn(N, 4), alone=False)
class VAE(nn.Module):
    """Reparametrised noise between encoder and decoder; a negative evidence bound a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(4, 5, 4), mlp(2, 5, 4)
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        posterior = torch.distributions.Normal(*self.halves(self.encoder(x)))
        z = posterior.rsample()
        prior = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
        divergence = torch.distributions.kl_divergence(posterior, prior).sum(1)
        error = (self.decoder(z) - x).square() / self.log_variance.exp() + self.log_variance
        return error.sum(1) / 2 + 0.5 * divergence

    @staticmethod
    def halves(h: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = h.chunk(2, 1)
        return mean, log_scale.exp()


@member("koopman", "W14", lambda: torch.randn(N, 3))
class Koopman(nn.Module):
    """A linear latent map with eigenvalues on the circle, applied step after step."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(3, 4), mlp(4, 2)
        self.generator = nn.Parameter(torch.randn(4, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.encode(x))
        step = torch.linalg.matrix_exp(self.generator - self.generator.T)
        frames = []
        for _ in range(3):
            z = z @ step
            frames.append(self.decode(z)[:, 0])
        return torch.stack(frames, 1)


@member("normalising-flow", "W14 W17", lambda: torch.randn(N, 4))
class Flow(nn.Module):
    """Coupling layers around an invertible matrix, whose determinant no sample enters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(2, 5, 4), mlp(2, 5, 4)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        log_density = torch.linalg.slogdet(self.mix)[1]
        for net in (self.first, self.second):
            still, moved = x.chunk(2, 1)
            log_scale, shift = net(still).chunk(2, 1)
            x = torch.cat([moved * log_scale.tanh().exp() + shift, still], 1) @ self.mix
            log_density = log_density + log_scale.tanh().sum(1)
        return x.square().sum(1) / 2 - log_density


# Contrasts and tasks ----------------------------------------------------------------------------


@member("simclr", "W15", lambda: torch.randn(N, 2, 4), "rows", coupled=True, alone=False)
class Contrast(nn.Module):
    """The loss of a sample compares its two views with those of all others: it is coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.net(x), dim=-1)
        return F.cross_entropy(z[:, 0] @ z[:, 1].T / 0.5, torch.arange(len(x)), reduction="none")


@member(
    "batch-norm-training",
    "",
    lambda: torch.randn(N, 4),
    "rows",
    coupled=True,
    alone=False,
    training=True,
)
class BatchNormTraining(nn.Sequential):
    """Statistics of the batch: each output depends on all samples."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


@member("teacher", "W15", lambda: torch.randn(N, 2, 4), training=True)
class Teacher(nn.Module):
    """A moving average of the student, updated in the forward pass, gives the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.predictor = mlp(4, 5, 3), mlp(3, 3)
        self.teacher = mlp(4, 5, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.lerp_(s, 0.1)
        guess = self.predictor(torch.tanh(self.student(x[:, 0])))
        return 1 - F.cosine_similarity(guess, self.teacher(x[:, 1]))


@member("episodes", "W15", lambda: torch.randn(N, 2, 3, 4))
class Prototypes(nn.Module):
    """A sample is an episode: queries are compared with the mean of each class's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)  # (N, classes, examples, 3), the last example of the first class queries
        prototypes = z[:, :, :2].mean(2)
        return -torch.cdist(z[:, 0, 2:], prototypes)[:, 0].square() * self.temperature


@member("inner-loop", "W19", lambda: (torch.randn(N, 3, 2), torch.randn(N, 3, 1)))
class InnerLoop(nn.Module):
    """A sample is a task: weights are fitted to it in two steps, which are differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 4, 1)
        self.rate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for inputs, targets in zip(x, y, strict=True):
            fast = dict(self.net.named_parameters())
            for _ in range(2):
                guess = torch.func.functional_call(self.net, fast, (inputs[:2],))
                loss = F.mse_loss(guess, targets[:2])
                steps = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {k: w - self.rate * s for (k, w), s in zip(fast.items(), steps, strict=True)}
            guess = torch.func.functional_call(self.net, fast, (inputs[2:],))
            losses.append((guess - targets[2:]).square().sum())
        return torch.stack(losses)


@member("inner-loop-mapped", "W19", lambda: (torch.randn(N, 3, 2), torch.randn(N, 3, 1)))
class MappedInnerLoop(InnerLoop):
    """The same with torch.func, mapped over tasks: each task's weights are a row of a batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(torch.func.functional_call(self.net, weights, (x,)), y)

        def adapted(x: Tensor, y: Tensor) -> Tensor:
            weights = dict(self.net.named_parameters())
            steps = torch.func.grad(loss)(weights, x[:2], y[:2])
            weights = {name: w - self.rate * steps[name] for name, w in weights.items()}
            return loss(weights, x[2:], y[2:])

        return torch.func.vmap(adapted)(x, y)


@member(
    "policy",
    "W19",
    lambda: (torch.randn(N, 4, 3), torch.randint(0, 3, (N, 4)), torch.randn(N, 4)),
)
class Policy(nn.Module):
    """Actor and critic on a trajectory: clipped ratios, whose gradient may vanish, and entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        h = F.relu(self.trunk(states))
        policy = torch.distributions.Categorical(logits=self.actor(h))
        value = self.critic(h)[..., 0]
        advantage = rewards.flip(1).cumsum(1).flip(1) - value.detach()
        ratio = (policy.log_prob(actions) + math.log(3)).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        fit = F.smooth_l1_loss(value, rewards, reduction="none")
        return (fit - clipped - 0.01 * policy.entropy()).mean(1)


@member("progressive", "W19", lambda: torch.randn(N, 3))
class Progressive(nn.Module):
    """A later task: the first network is frozen and feeds the second from the side."""

    def __init__(self) -> None:
        super().__init__()
        self.old = mlp(3, 4, 2).requires_grad_(False)
        self.new, self.side = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.old[0](x))
        return self.head(torch.tanh(self.new(x) + self.side(h))) + self.old[2](h)


@member("learned-solver", "W19", lambda: torch.randn(N, 3, 3))
class ConjugateDirections(nn.Module):
    """Conjugate gradients with a learned preconditioner; a sample is a linear system."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.mix = nn.Linear(3, 3, bias=False)

    def forward(self, a: Tensor) -> Tensor:
        a = a @ a.mT + torch.eye(3, dtype=a.dtype)
        x, r = a.new_zeros(len(a), 3), a.new_ones(len(a), 3)
        for _ in range(2):
            p = self.scale * r + 0.1 * torch.tanh(self.mix(r))
            ap = torch.einsum("nij,nj->ni", a, p)
            step = (r * p).sum(1, keepdim=True) / (p * ap).sum(1, keepdim=True)
            x, r = x + step * p, r - step * ap
        return x


@member("layer-local", "W20", lambda: torch.randn(N, 4))
class ForwardForward(nn.Module):
    """Losses local to the layers, between which nothing flows back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        losses = []
        for layer in self.layers:
            x = F.relu(layer(F.normalize(x.detach())))
            losses.append(F.softplus(1 - x.square().sum(1)))
        return torch.stack(losses, 1)


@member("bayesian", "W20", lambda: torch.randn(N, 4), alone=False)
class Bayesian(nn.Module):
    """Weights are drawn in the forward pass, the same for all samples, from a trained normal."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mean + self.log_scale.exp() * torch.randn_like(self.mean)
        return self.head(torch.tanh(F.linear(x, weight)))


@member("gaussian-process", "W20", lambda: (torch.randn(N, 4, 2), torch.randn(N, 4)))
class GaussianProcess(nn.Module):
    """A marginal likelihood by Cholesky factors; a sample is a data set."""

    def __init__(self) -> None:
        super().__init__()
        self.log_length, self.log_noise = (
            nn.Parameter(torch.randn(2)),
            nn.Parameter(torch.zeros(())),
        )
        self.log_scale, self.mean = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        # Made on the fly, it could be the samples: it is as long as there are samples.
        self.register_buffer("identity", torch.eye(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x / self.log_length.exp()
        kernel = self.log_scale.exp() * torch.exp(-torch.cdist(x, x).square() / 2)
        kernel = kernel + (self.log_noise.exp() + 1e-3) * self.identity
        factor = torch.linalg.cholesky(kernel)
        white = torch.linalg.solve_triangular(factor, (y - self.mean)[..., None], upper=False)
        half_log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return white.square().sum((1, 2)) / 2 + half_log_det


@member("hamiltonian", "W20", lambda: torch.randn(N, 2))
class Hamiltonian(nn.Module):
    """Symplectic steps along the gradients of a learned energy."""

    def __init__(self) -> None:
        super().__init__()
        self.kinetic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))
        self.potential = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.requires_grad_().split(1, 1)
        for _ in range(2):
            p = p - 0.3 * slope(self.potential(q), q)
            q = q + 0.3 * slope(self.kinetic(p), p)
        return torch.cat([q, p], 1)


# Custom layers ----------------------------------------------------------------------------------


@member("hopfield", "W18", lambda: torch.randn(N, 4))
class Hopfield(nn.Module):
    """A dense associative memory: patterns are both keys and values, read until they settle."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(5, 4))
        self.log_beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = (self.log_beta.exp() * x @ self.patterns.T).softmax(-1) @ self.patterns
        energy = -torch.logsumexp(self.log_beta.exp() * x @ self.patterns.T, -1)
        return torch.cat([x, energy[:, None]], 1)


class Splines(nn.Module):
    """A layer of cubic splines on the edges, by the recursion of Cox and de Boor."""

    def __init__(self, inputs: int, outputs: int, cells: int = 3, order: int = 3) -> None:
        super().__init__()
        knots = torch.arange(-order, cells + order + 1) * (4.0 / cells) - 2
        self.register_buffer("knots", knots)
        self.order = order
        self.coefficients = nn.Parameter(torch.randn(outputs, inputs, cells + order))
        self.base = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        t, u = self.knots, x.clamp(-1.99, 1.99).unsqueeze(-1)
        b = ((u >= t[:-1]) & (u < t[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (u - t[: -k - 1]) / (t[k:-1] - t[: -k - 1])
            right = (t[k + 1 :] - u) / (t[k + 1 :] - t[1:-k])
            b = left * b[..., :-1] + right * b[..., 1:]
        return torch.einsum("nik,oik->no", b, self.coefficients) + F.linear(F.silu(x), self.base)


@member("kan", "W18", lambda: torch.randn(N, 3))
class KAN(nn.Sequential):
    """Trained functions on edges instead of weights; the second layer's splines see the first's."""

    def __init__(self) -> None:
        super().__init__(Splines(3, 4), Splines(4, 2))


@member("radial-basis", "W18", lambda: torch.randn(N, 3), "rule node")
class RadialBasis(nn.Module):
    """Centres and widths, Gaussian and Cauchy units, and the frequencies of a random basis."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 3))
        self.log_width = nn.Parameter(torch.zeros(4))
        self.frequencies = nn.Parameter(torch.randn(3, 4))
        self.cauchy = nn.Parameter(torch.randn(3, 12))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.exp(-torch.cdist(x, self.centres) * self.log_width.exp())
        wave = x @ self.frequencies
        h = torch.cat([near, wave.sin(), wave.cos()], 1)
        a, b, d = self.cauchy
        return self.head((a * h + b) / (h.square() + d.square() + 1))


@member(
    "deep-sets",
    "W18",
    lambda: (
        torch.randn(sum(DeepSets.sizes), 3),
        torch.arange(N).repeat_interleave(torch.tensor(DeepSets.sizes))[
            torch.randperm(sum(DeepSets.sizes))
        ],
    ),
    singles=singles_of(1),
)
class DeepSets(nn.Module):
    """Sets of different sizes, their elements in no order, pooled by sum and by maximum."""

    sizes = (2, 4, 1, 3)

    def __init__(self) -> None:
        super().__init__()
        self.element, self.whole = mlp(3, 5, 4), mlp(8, 5, 2)

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        h, n = self.element(x), int(owner.max()) + 1
        total = h.new_zeros(n, 4).index_add(0, owner, h)
        largest = h.new_full((n, 4), -9.0).scatter_reduce(0, owner[:, None].expand_as(h), h, "amax")
        return self.whole(torch.cat([total, largest], 1))


class Round(torch.autograd.Function):
    """Rounding whose gradient is passed straight through."""

    @staticmethod
    def forward(x, scale):
        return (x / scale).round() * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 8 * ctx.scale), None


@member("quantised", "W18", lambda: torch.randn(N, 4))
class Quantised(nn.Module):
    """Rounded weights and activations with straight-through gradients, and binary gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.third, self.step = nn.Linear(4, 2), nn.Parameter(torch.tensor([0.1]))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.linear(x, Round.apply(self.first.weight, 0.1), self.first.bias))
        x = Round.apply(x, 0.5)
        weight = torch.fake_quantize_per_tensor_affine(self.second.weight, 0.1, 0, -8, 7)
        x = torch.tanh(F.linear(x, weight, self.second.bias))
        soft = torch.sigmoid(self.gate)
        x = x * ((soft > 0.5).to(x.dtype) + soft - soft.detach())
        scaled = self.third.weight / self.step
        learned = (scaled + (scaled.round() - scaled).detach()) * self.step
        return F.linear(x, learned, self.third.bias)


@member("observed", "W18", lambda: torch.randn(N, 4), alone=False, training=True)
class Observed(nn.Module):
    """Quantisation whose range follows the data, in buffers that the forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.quantise = torch.ao.quantization.FakeQuantize.with_args(
            quant_min=0, quant_max=255, dtype=torch.quint8
        )()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.quantise(torch.tanh(self.first(x))))


@member("field", "W18", lambda: torch.randn(N, 2, 3))
class RadianceField(nn.Module):
    """A sample is a ray; opacity accumulates along it; features are read off a trained grid."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(1, 2, 4, 4))
        self.net = mlp(5, 6, 3)

    def forward(self, rays: Tensor) -> Tensor:
        origin, direction = rays.unbind(1)
        t = torch.linspace(0, 1, 4, dtype=rays.dtype)[:, None]
        points = origin[:, None] + t * direction[:, None]  # (N, 4, 3)
        grid = self.grid.expand(len(rays), -1, -1, -1)
        seen = F.grid_sample(grid, torch.tanh(points[:, :, None, :2]), align_corners=True)
        density, colour = self.net(torch.cat([points, seen[..., 0].mT], -1)).split([1, 2], -1)
        opacity = 1 - torch.exp(-F.softplus(density))
        clear = torch.cumprod(1 - opacity, 1)
        return (opacity * clear / (1 - opacity) * torch.sigmoid(colour)).sum(1)
