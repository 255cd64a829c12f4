"""Flat-histogram sampling: Wang-Landau, then multicanonical runs with the weights that it found.

Walkers move so that all energies are seen alike: a move from energy E to E' is accepted with
probability min(1, g(E) / g(E')), where g is what is known of the number of states. All walkers
share g, in three stages.

1. *Exploring.* Moves that are proposed, accepted or not, tell how many states of E' are next to
   those of E, and so g(E') / g(E): the transition matrix (Wang, Tay and Swendsen 1999, Phys. Rev.
   Lett. 82, 476), from which g is made anew now and then. Energies are taken up one after the
   other, while walkers come back from the last of them to where most states are: in isolated
   states, as of a glass, walkers would be caught, and learn a g that catches others. This ends
   when a third of all visits has found next to no new energy.
2. *Wang-Landau* with the 1 / t schedule (Wang and Landau 2001, Phys. Rev. Lett. 86, 2050;
   Belardinelli and Pereyra 2007, Phys. Rev. E 75, 046701): at each visit ln g(E) grows by ln f =
   1 / t, with t the visits so far over the number of energies. Its error falls as t^-1/2.
3. *Multicanonical* (Berg and Neuhaus 1992, Phys. Rev. Lett. 68, 9): g is held, and the histogram H
   of visits says S(E) = ln g(E) + ln H(E) without bias, whatever g is. Groups of walkers, which
   share nothing any more, tell the error by the jackknife.

Walkers may be confined to windows of energies that overlap, and exchange windows where both are
within both, which is always accepted, as g is shared. The second and third stage end only when
walkers have crossed their windows as often as there are walkers, in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.landscape.crossings import Crossings
from nettrace.landscape.multicanonical import Production
from nettrace.landscape.transitions import stationary
from nettrace.landscape.walkers import Walkers

Array = npt.NDArray[np.float64]
#: Sweeps that it takes walkers to forget where they were, about.
_FORGETTING = 100
#: Sweeps of each walker in the first stage, at least.
_EXPLORING = 300
#: The share of proposals that still counts when visits have grown by a fifth.
_KEPT = 0.7
#: How often walkers come back from the last energies, each on average, before more are taken up.
_BACK = 0.25
#: Sweeps of each walker to get to the energies that are allowed, at most.
_ENTERING = 2000
#: Groups, and ways back, that tell errors well, at least.
_FEW = 16
#: Groups of walkers, at most, of which the jackknife leaves out one after the other.
_GROUPS = 64


class WangLandau:
    """Walkers that see all energies alike, and what they tell of the number of states.

    Args:
        walkers: W of them.
        energies: B, how many energies there may be.
        allowed: (B,) those that count; None for all. Walkers that begin elsewhere go there first.
        error: the standard error of S(E) that is enough, for each energy.
        windows: how many windows walkers are confined to, once the energies are known.
        observables: by name, what gives a number (W,) for each walker.
        sweep: after how many moves all has had a chance to move: then observables are looked at.
        piece: how many moves are made at once; windows are exchanged between pieces, where a sweep
            or more has passed.
        seed: of what is drawn.
        title: for the progress bar.

    Attributes:
        stage: "exploring", "Wang-Landau", "multicanonical" or "done".
        log_g: (B,) what is known of S(E), up to a constant; infinite where walkers may not go.
        seen: (B,) which energies were seen.
        visits: by all walkers, since the beginning.
        seconds: that were spent on them.
        history: (visits, ln f, ln g) whenever ln f had halved in the second stage.
        proposed: (B,) which energies are known to exist.

    Raises:
        ValueError: if there are too few walkers, or an argument is out of its range.
    """

    def __init__(
        self,
        walkers: Walkers,
        energies: int,
        *,
        allowed: Tensor | None = None,
        error: float = 0.05,
        windows: int = 1,
        observables: Mapping[str, Callable[[Any], Tensor]] | None = None,
        sweep: int = 1,
        piece: int = 256,
        seed: int = 0,
        title: str = "density of states",
    ) -> None:
        copies = len(walkers.energies)
        if copies < 2:
            raise ValueError(
                f"expected two walkers or more, got {copies}: errors are told by how far "
                "independent walkers differ"
            )
        if not 1 <= windows <= copies // 2 or copies % windows:
            raise ValueError(
                f"expected windows= to be between 1 and half of the {copies} walkers, and to "
                f"divide them, got {windows}"
            )
        if not error > 0:
            raise ValueError(f"expected error= to be positive, got {error!r}")
        self.title, self.walkers, self.stage = title, walkers, "exploring"
        self._copies, self._bins, self._windows = copies, energies, windows
        self._error, self._sweep, self._moves = error, sweep, piece
        self._observables = dict(observables or {})
        self._generator = generator(seed, "Wang-Landau")
        self._allowed = torch.ones(energies, dtype=torch.bool) if allowed is None else allowed
        self._outside = not bool(self._allowed[walkers.energies].all())
        # One more, at -1: where a move that cannot be made leads.
        self._weights = torch.full((energies + 1,), torch.inf, dtype=torch.float64)
        self.seen = torch.zeros(energies, dtype=torch.bool)
        # NumPy's zeros take no memory where nothing is added.
        self._transitions = torch.from_numpy(np.zeros((energies, energies)))
        self.visits, self.seconds = 0, 0.0
        self.proposed = torch.zeros(energies, dtype=torch.bool)
        self._refreshed = 0  # visits when g was last made from transitions
        self._growth: list[tuple[int, int]] = []  # visits, energies seen
        self._origin = 0  # visits when 1 / t begins
        self._moved = 0  # since windows were exchanged
        self._entering = 0  # moves to get to the energies that are allowed
        self._not_finite: set[str] = set()
        self.history: list[tuple[int, float, Array]] = []
        #: Which walkers share windows, one in each; and which of them are left out together.
        chains = copies // windows
        self._slots = torch.arange(copies).view(windows, chains)
        self._groups = min(_GROUPS, chains)
        self._low = torch.zeros(copies, dtype=torch.int64)
        self._high = torch.full((copies,), energies - 1)
        self._chain_groups = torch.arange(chains) % self._groups
        self._place = (self._chain_groups * windows).repeat(windows)
        self._crossings = Crossings(copies, windows, energies)
        self._production = Production(self._groups, windows, energies, list(self._observables))

    @property
    def log_g(self) -> Array:
        """(B,) what is known of S(E)."""
        return self._weights[:-1].numpy().copy()

    @property
    def share(self) -> float:
        """How much is done; errors fall with the square root of the visits."""
        if self.stage == "done":
            return 1.0
        if self.stage != "multicanonical" or not self._production.worst:
            return 0.0
        return min(0.99, (self._error / self._production.worst) ** 2)

    @property
    def left_out(self) -> Tensor:
        """(B,) which energies exist, but are not counted."""
        return self.proposed & self._allowed & ~self.seen

    @property
    def seldom(self) -> Tensor:
        """(B,) which energies are counted, though walkers came back from there a few times only."""
        if self._production.burning:
            return torch.zeros_like(self.seen)
        return self.seen & (self._crossings.returns < _FEW)

    def own_doubts(self) -> list[str]:
        """What makes any result doubtful."""
        found = []
        if self._groups < _FEW:
            found.append(
                f"errors are told by {self._groups} groups of walkers: of fewer than {_FEW} they "
                "may be too small by far; take more walkers, or fewer windows"
            )
        found += [
            f"the observable {name!r} was not finite for some walkers"
            for name in sorted(self._not_finite)
        ]
        return found

    def settle(self) -> None:
        """Holds the weights, however good they are; no energies are taken up from now on."""
        if self.stage != "multicanonical" and not self._outside and self.visits:
            self._hold()

    def entropies(self) -> tuple[Array, Array]:
        """(B,) ln of the share of all at each energy; (G, B) the same without each group.

        Of none, G = 0, as long as walkers share what they learn, or are yet to forget it.
        """
        if self._production.visits.any():
            entropy, without = self._production.entropies()
            return entropy, without[:0] if self._production.burning else without
        log_g = np.where(self.seen.numpy(), self.log_g, -np.inf)
        with np.errstate(invalid="ignore"):
            return log_g - np.logaddexp.reduce(log_g), np.empty((0, self._bins))

    def means(self) -> dict[str, tuple[Array, Array]]:
        """For each observable its averages (B,), and (G, B) without each group; G as above."""
        found = self._production.means()
        if self._production.burning:
            return {name: (mean, np.empty((0, self._bins))) for name, (mean, _) in found.items()}
        return found

    @property
    def production_visits(self) -> Array:
        """(B,) visits since the weights are held."""
        visits: Array = self._production.visits.sum((0, 1))
        return visits

    @property
    def unmixed(self) -> tuple[int, int, float] | None:
        """The window that was crossed the least, and how often, if less than once by a walker."""
        times = self._crossings.times
        window = int(times.argmin())
        if times[window] >= 1:
            return None
        walker = self._slots[window, 0]
        return int(self._low[walker]), int(self._high[walker]), float(times[window])

    def advance(self) -> None:
        """Makes some moves."""
        begun = time.perf_counter()
        if self._outside:
            self._enter()
        else:
            self._moved += self._moves
            if self._windows > 1 and self._moved >= self._sweep:
                self._moved = 0
                self._exchange()
            before = self.walkers.energies.clone()
            parts = self._walk()
            with _one_thread():
                track, proposals = (torch.cat(part) for part in zip(*parts, strict=True))
                self._account(before, track, proposals)
        self.seconds += time.perf_counter() - begun

    def _walk(self) -> list[tuple[Tensor, Tensor]]:
        """Moves all walkers; the energies after, and those proposed, (moves, W), in parts."""
        weights, learning = self._weights, self.stage == "Wang-Landau"
        moves = self._moves
        if self.stage == "exploring":  # for what is found to be made use of soon
            moves = min(moves, max(64, 4 * self._sweep))
        shape, random = (moves, self._copies), self._generator
        chances = torch.rand(shape, generator=random, dtype=torch.float64)
        known, parts = int(self.seen.sum()), []
        looking = bool(self._observables) and self.stage == "multicanonical"
        # What is learned within a sweep is put to use after it: a hundredth at most (_FORGETTING).
        for part in chances.split(self._sweep if learning or looking else moves):
            track, proposals = self.walkers.walk(part, weights, self._low, self._high)
            parts.append((track, proposals))
            self.visits += track.numel()
            if learning:
                seen = torch.bincount(track.flatten(), minlength=len(weights))
                weights += known / (self.visits - self._origin) * seen
            if looking:
                self._look()
        return parts

    def _look(self) -> None:
        """Takes the observables of all walkers."""
        values = []
        for name, look in self._observables.items():
            value = look(self.walkers).detach().cpu()
            if value.shape != (self._copies,):
                raise ValueError(
                    f"expected the observable {name!r} to give a number for each of the "
                    f"{self._copies} walkers, got shape {tuple(value.shape)}"
                )
            if not bool(value.isfinite().all()):
                self._not_finite.add(name)
            values.append(value)
        self._production.observe(self._place, self.walkers.energies, values)

    def _enter(self) -> None:
        """Brings walkers to the energies that are allowed; the odd move away keeps them going."""
        inside = self._allowed.nonzero()[:, 0]
        low, high = inside.min(), inside.max()

        def distance(energies: Tensor) -> Tensor:
            return (low - energies).clamp_min(0) + (energies - high).clamp_min(0)

        for _ in range(self._moves):
            before = distance(self.walkers.energies)
            to, _ = self.walkers.propose(self._weights)
            away = torch.rand(self._copies, generator=self._generator) < 0.02 * (before > 0)
            self.walkers.accept((to >= 0) & ((distance(to) <= before) | away))
        self._outside = not bool(self._allowed[self.walkers.energies].all())
        self._entering += self._moves
        if self._outside and self._entering > _ENTERING * self._sweep:
            self.stage = "done"  # with nothing

    def _exchange(self) -> None:
        """Exchanges windows between walkers of a chain that are both within both."""
        first = int(torch.randint(2, (), generator=self._generator))
        energies = self.walkers.energies
        for window in range(first, self._windows - 1, 2):
            one, other = self._slots[window].clone(), self._slots[window + 1].clone()
            low, high = self._low[other], self._high[one]
            both = torch.stack([energies[one], energies[other]])
            swap = ((both >= low) & (both <= high)).all(0)
            self._slots[window] = torch.where(swap, other, one)
            self._slots[window + 1] = torch.where(swap, one, other)
            for held in (self._low, self._high, self._place, *self._crossings.held):
                at_one, at_other = held[one], held[other]
                held[one] = torch.where(swap, at_other, at_one)
                held[other] = torch.where(swap, at_one, at_other)

    def _account(self, before: Tensor, track: Tensor, proposals: Tensor) -> None:
        """Goes on with the stage, by what was seen."""
        self.proposed |= torch.bincount(proposals.flatten() + 1, minlength=self._bins + 1)[1:] > 0
        if self.stage == "exploring":
            new = torch.bincount(track.flatten(), minlength=self._bins) > 0
            found = bool((new & ~self.seen).any())
            self.seen |= new
            self._count(torch.cat([before[None], track[:-1]]), proposals)
            self._crossings.follow(track)
            self._explore(found)
            return
        self._crossings.follow(track)
        if self.stage == "Wang-Landau":
            self._learn()
        else:
            self._produce(track)

    def _count(self, begun: Tensor, proposals: Tensor) -> None:
        """Adds moves that were proposed, from some energies (moves, W) to others."""
        low, high = int(begun.min()), int(torch.maximum(begun.max(), proposals.max()))
        low = min(low, int(proposals.where(proposals >= 0, low).min()))
        size = high - low + 1
        # The first column is of moves that lead nowhere.
        pairs = (begun - low) * (size + 1) + (proposals - low + 1).clamp_min_(0)
        counts = torch.bincount(pairs.flatten(), minlength=size * (size + 1)).view(size, -1)
        self._transitions[low : high + 1, low : high + 1] += counts[:, 1:]

    def _explore(self, found: bool) -> None:
        due = self.visits >= 1.2 * self._refreshed
        if found or due:
            self._estimate()
        if due:
            self._refreshed = self.visits
            known, reached = int(self.seen.sum()), self._transitions[self.seen]
            self._transitions[self.seen] = _KEPT * reached  # of states that were hurried through
            self._growth.append((self.visits, known))
            before = [then for visits, then in self._growth if visits < 2 / 3 * self.visits]
            tried = self.visits >= _EXPLORING * self._sweep * self._copies
            if tried and before and known <= 1.02 * before[-1]:
                if known == 1:  # there are no others, or none that moves lead to
                    self.stage = "done"
                    return
                self.stage = "Wang-Landau"
                self._split()
                self._crossings.forget()
                return
        self._take_up()

    def _take_up(self) -> None:
        """Lets walkers go further, where they come back from."""
        known, returns = self.seen.nonzero()[:, 0], self._crossings.returns
        first, last = int(known[0]), int(known[-1])
        step, enough = max(1, len(known) // 20), _BACK * self._copies
        more = self.proposed & self._allowed & self._weights[:-1].isposinf()
        taken = [more[first:last].nonzero()[:, 0] + first]
        if returns[first] >= enough:
            taken.append(more[:first].nonzero()[-step:, 0])
        if returns[last] >= enough:
            taken.append(more[last:].nonzero()[:step, 0] + last)
        # Whoever meets them goes there, and tells by the ways back how many states there are.
        self._weights[torch.cat(taken)] = -torch.inf

    def _estimate(self) -> None:
        """S(E) from the moves that were proposed between energies that were seen."""
        places = self.seen.nonzero()[:, 0]
        matrix = self._transitions[places][:, places]
        self._weights[places] = torch.from_numpy(stationary(matrix.numpy()))
        self._crossings.home = int(places[self._weights[places].argmax()])

    def _split(self) -> None:
        """Windows that take as long to cross each, of which neighbours share half.

        Where energies diffuse by D a move, crossing takes (sum of D^-1/2 over energies)^2 / 2.
        """
        self._weights[:-1][~self.seen] = torch.inf
        places = self.seen.nonzero()[:, 0]
        known = len(places)
        if self._windows > max(1, known // 3):
            raise ValueError(
                f"windows={self._windows} of the {known} energies that there are would be of fewer "
                "than three each: choose fewer"
            )
        flow = self._transitions[places][:, places]
        flow = flow / flow.sum(1, keepdim=True).clamp_min(1)
        weights = self._weights[places]
        accepted = flow * (weights[:, None] - weights).exp().clamp_max(1)
        diffusion = (accepted * (places[:, None] - places) ** 2).sum(1) / 2
        length = diffusion.clamp_min(1e-6).rsqrt().cumsum(0)
        # As if there had been as many visits as it takes walkers to forget where they were: with
        # larger steps, what is known of energies seldom seen would lag behind.
        self._origin = self.visits - _FORGETTING * self._sweep * self._copies
        cuts = torch.linspace(0, 1, self._windows + 2, dtype=torch.float64) * length[-1]
        cut = torch.searchsorted(length, cuts).clamp_(max=known - 1)
        order = self.walkers.energies.argsort(stable=True)
        self._slots = order.view(self._windows, -1)
        for window, walkers in enumerate(self._slots):
            low = min(int(cut[window]), known - 3 - (self._windows - 1 - window))
            high = max(int(cut[window + 2]), low + 2)
            first, last = window == 0, window == self._windows - 1
            low, high = 0 if first else low, known - 1 if last else min(high, known - 1)
            # The outermost are open.
            self._low[walkers] = 0 if first else places[low]
            self._high[walkers] = self._bins - 1 if last else places[high]
            self._place[walkers] = self._chain_groups * self._windows + window
            # The last energies of all may be of a few states only, which hardly anybody finds.
            edge = (high - low) // 20
            self._crossings.begin(walkers, window, places[low + edge], places[high - edge])

    def _learn(self) -> None:
        log_f = int(self.seen.sum()) / (self.visits - self._origin)
        last = log_f < self._error**2 / 4 and self._crossings.fewest >= 1
        if last or not self.history or log_f <= self.history[-1][1] / 2:
            self.history.append((self.visits, log_f, self.log_g))
        if last:
            self._hold()

    def _hold(self) -> None:
        """Begins the third stage."""
        if self.stage == "exploring":
            self._estimate()
            self._split()
        self.stage = "multicanonical"
        self._produce_with(self._weights[:-1].numpy())

    def _produce_with(self, log_g: Array) -> None:
        """Samples anew with other weights."""
        self._weights[:-1] = torch.from_numpy(log_g)
        self._crossings.forget()
        first = self._slots[:, 0]
        self._production.begin(log_g, self._low[first].numpy(), self._high[first].numpy())

    def _produce(self, track: Tensor) -> None:
        production = self._production
        production.count(self._place, track)
        if production.burning:
            # What is left of the stages before is forgotten, and made use of once.
            if self._crossings.fewest >= 1:
                self._produce_with(production.flattened(self.log_g))
                production.burning = False
        elif production.examine() <= self._error and self._crossings.fewest >= 4:
            self.stage = "done"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations of microseconds each are not worth the wait for threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
