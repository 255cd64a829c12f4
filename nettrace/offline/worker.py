"""What one process does of an analysis: checkpoints measured one by one, each by itself.

What is found on a checkpoint depends on the checkpoints before it, as it would in a training, but
never on which of them this process has seen: what it lacks, it loads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from nettrace import locate
from nettrace.certificate import Certificate, certify
from nettrace.checkpoints import Checkpoint, CheckpointError, Contents
from nettrace.checkpoints.building import Model
from nettrace.checkpoints.networks import Networks
from nettrace.freeze import frozen
from nettrace.measures import Measure, resolve
from nettrace.missing import told
from nettrace.offline.witness import Witness, seen, together
from nettrace.operator import Jacobian
from nettrace.probe import Probe, fingerprint
from nettrace.record import Record
from nettrace.statistics import Statistics, Unavailable
from nettrace.statistics.preconditioned import PreconditionedStatistics
from nettrace.tracer import Tracer
from nettrace.waiting import reads_window

#: What one look left for later ones, by probe and reference, as `Past.state_dict` has it.
Left: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]

_NO_WINDOW = (
    "it is of the weights after each of many updates in a row, and checkpoints are of single ones: "
    "measure it while training, as by the callback WeightFluctuations or Tracer.attached"
)
_OF_OPTIMIZERS = {name for name in vars(PreconditionedStatistics) if not name.startswith("_")}


@dataclass(frozen=True)
class Plan:
    """What an analysis is of: the same for all of its checkpoints.

    Args:
        checkpoints: all there are, in the order of their steps.
        model: the network.
        probe: the samples.
        fingerprint: of the probe.
        seed: as in `Tracer`, and for networks that are built.
        memory_budget: as in `Tracer`.
        max_seconds: as in `Tracer`.
        threads: how many each worker computes with; None leaves them as they are.
        allow_pickle: whether the code in checkpoints may be run.
        modules: those that define measures.
    """

    checkpoints: tuple[Checkpoint, ...]
    model: Model
    probe: Probe | Mapping[str, Probe] | str
    fingerprint: str
    seed: int
    memory_budget: int | str
    max_seconds: float | None
    threads: int | None
    allow_pickle: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What was found on a checkpoint.

    Args:
        position: of the checkpoint in the plan.
        records: those of its step.
        failure: why there are none, if there are none.
        witness: of what the network gives.
    """

    position: int
    records: tuple[Record, ...] = ()
    failure: str | None = None
    witness: Witness = field(default_factory=dict)


class Worker:
    """Measures the checkpoints of a plan, in any order.

    Raises:
        ValueError: if the network, the probe or a module cannot be had here.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        #: Is told which checkpoint's weights are in use; -1 for none.
        self.note: Callable[[int], object] = lambda position: None
        self._at = -1
        self._shunned: frozenset[int] = frozenset()
        for module in plan.modules:
            locate.import_module(module)
        probe = plan.probe
        self.probe = locate.probe(probe) if isinstance(probe, str) else probe
        if fingerprint(self.probe) != plan.fingerprint:
            raise ValueError(
                f"{probe} gives other samples each time: set the seed of what it draws, or pass a "
                "Probe"
            )
        self._several = [self.probe] if isinstance(self.probe, Probe) else [*self.probe.values()]
        self._positions = {c.step: place for place, c in enumerate(plan.checkpoints)}
        self._networks = Networks(plan.checkpoints[0], plan.model, plan.seed, plan.allow_pickle)
        self._names: tuple[str, ...] = ()
        self._measures: list[Measure] = []
        self._tracer: _NumberedTracer
        self._probes: list[str] = []
        #: What looks left that were taken here, by position.
        self._left: dict[int, Left] = {}

    def measure(
        self, position: int, names: tuple[str, ...], shunned: Iterable[int] = ()
    ) -> Outcome:
        """Takes measures of a checkpoint.

        Args:
            position: of the checkpoint in the plan.
            names: of the measures.
            shunned: positions of checkpoints that count as broken.

        Raises:
            ValueError: if a measure is not known here.
        """
        if names != self._names:
            try:
                self._measures = resolve(names)
            except ValueError as error:
                raise ValueError(
                    f"{error}; a worker knows measures that are defined in modules=[...]"
                ) from error
            self._names, self._left = names, {}
            self._tracer = _NumberedTracer(self, names)
            self._probes = [one.probe.fingerprint() for one in self._tracer.each()]
        self._shunned = frozenset(shunned)
        return self._tried(position, self._measured)

    def look(self, position: int) -> Outcome:
        """Sees what the network gives at a checkpoint, and takes no measures."""
        return self._tried(position, self._looked_at)

    def _tried(self, position: int, find: Callable[[int], Outcome]) -> Outcome:
        with _threads(self._plan.threads), self.at(position):
            try:
                return find(position)
            except (CheckpointError, locate.LocateError) as error:
                return Outcome(position, failure=str(error))
            except (Exception, SystemExit) as error:  # of code of the user's
                return Outcome(position, failure=told(error))

    def _measured(self, position: int) -> Outcome:
        step = self._plan.checkpoints[position].step
        self._recall(position, first_only=False)
        model, contents = self._load(position)
        records = self._records(model, contents, step)
        if self._tracer.failure is not None:
            raise self._tracer.failure
        self._left[position] = self._left_by(step)
        return Outcome(position, tuple(records), witness=self._witness(model))

    def _looked_at(self, position: int) -> Outcome:
        model, _ = self._load(position)
        return Outcome(position, witness=self._witness(model))

    def _witness(self, model: nn.Module) -> Witness:
        """What the network gives on all probes, with the same random draws each time.

        Raises:
            Exception: what goes wrong with looking at all of them.
        """
        found, errors = [], []
        for probe in self._several:
            try:
                with frozen(model), locate.same_draws():
                    found.append(seen(probe, probe.look(model).detach()))
            except Exception as error:
                errors.append(error)
        if not found:
            raise errors[0]
        return together(found)

    @contextmanager
    def at(self, position: int) -> Iterator[None]:
        """Notes that the weights of a checkpoint are in use, in case that this process dies."""
        before, self._at = self._at, position
        self.note(position)
        try:
            yield
        finally:
            self._at = before
            self.note(before)

    def position(self, step: int) -> int:
        """That of the checkpoint of a step."""
        return self._positions[step]

    def apart(self, position: int) -> tuple[nn.Module, int]:
        """A network of its own with the weights of a checkpoint, and their step.

        Raises:
            Exception: if that cannot be had.
        """
        self._check_shunned(position)
        checkpoint = self._plan.checkpoints[position]
        return self._networks.apart(checkpoint)[0], checkpoint.step

    def _check_shunned(self, position: int) -> None:
        if position in self._shunned:
            raise CheckpointError(f"{self._plan.checkpoints[position].path} kills workers")

    def _load(self, position: int) -> tuple[nn.Module, Contents]:
        """The network with the weights of a checkpoint, and what else is in that."""
        return self._networks.load(self._plan.checkpoints[position])

    def _records(self, model: nn.Module, contents: Contents, step: int) -> list[Record]:
        optimizers: list[Optimizer] = []
        windowed = [measure for measure in self._measures if reads_window(measure)]
        measures = [measure for measure in self._measures if measure not in windowed]
        refused = self._tracer.refuse(windowed, step, Unavailable(_NO_WINDOW))
        needy = [m for m in measures if _OF_OPTIMIZERS & {_last(need) for need in m.needs}]
        if needy:
            try:
                optimizers = _optimizers(model, contents)
            except Unavailable as error:
                measures = [measure for measure in measures if measure not in needy]
                refused += self._tracer.refuse(needy, step, error)
        found = self._tracer.measure(model, step, measures, optimizers) if measures else []
        return [*refused, *found]

    def _recall(self, position: int, first_only: bool) -> None:
        """Puts in place what looks at the checkpoints before would have left for this one."""
        references = {m.reference for m in self._measures if m.reference is not None}
        if first_only:
            references = {reference for reference in references if reference[0] == "first"}
        kept: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        used = {position}
        for reference in sorted(references):
            key = " ".join(reference)
            order = range(position) if reference[0] == "first" else reversed(range(position))
            lacking = set(self._probes)
            for earlier in order:
                left = self._look_at(earlier)
                for probe in [probe for probe in lacking if key in left.get(probe, {})]:
                    kept[probe][key] = [left[probe][key]]
                    lacking.remove(probe)
                    used.add(earlier)
                if not lacking:
                    break
        if not first_only:
            self._left = {
                p: left for p, left in self._left.items() if p in used or not any(left.values())
            }
        self._tracer.load_state_dict({p: {"last": 0, "kept": kept[p]} for p in self._probes})

    def _look_at(self, position: int) -> Left:
        """What a look at a checkpoint leaves; nothing if it fails."""
        if position not in self._left:
            self._left[position] = {}
            # What goes wrong is reported where that checkpoint is measured.
            with suppress(Exception), self.at(position):
                self._check_shunned(position)
                self._recall(position, first_only=True)
                step = self._plan.checkpoints[position].step
                self._tracer.remember(self._load(position)[0], step, self._measures)
                self._left[position] = self._left_by(step)
        return self._left[position]

    def _left_by(self, step: int) -> Left:
        """What the look of a step left with the tracer."""
        return {
            probe: {
                reference: one
                for reference, several in past["kept"].items()
                for one in several
                if one["step"] == step
            }
            for probe, past in self._tracer.state_dict().items()
        }


class _NumberedTracer(Tracer):
    """A tracer whose records are numbered by the checkpoints' positions.

    Spot checks are due at the records number 1, 2, 4, 8, ..., and at any other where the last of
    those has failed or the operations on its tape are not the same. Where that was done by another
    process, it is done here once more.
    """

    def __init__(self, worker: Worker, names: Sequence[str]) -> None:
        self._worker = worker
        #: By position, the signature of the tape where a spot check was passed.
        self._passed: dict[int, str | None] = {}
        plan = worker._plan
        super().__init__(
            worker.probe,
            names,
            memory_budget=plan.memory_budget,
            max_seconds=plan.max_seconds,
            seed=plan.seed,
        )

    def twin(self, probe: Probe, name: str) -> Tracer:
        """The same for another probe."""
        twin = super().twin(probe, name)
        assert isinstance(twin, _NumberedTracer)
        twin._passed = {}
        return twin

    def _spot_check(self, jacobian: Jacobian, step: int) -> Certificate | None:
        position = self._worker.position(step)
        due = (1 << (position + 1).bit_length() - 1) - 1
        now = jacobian._gradients.signature()
        if position != due and self._signature_passed(due) == now:
            return None
        self._passed[position] = None
        certificate = certify(jacobian, seed=self._seed_at(step))
        self._passed[position] = now
        return certificate

    def _signature_passed(self, position: int) -> str | None:
        if position not in self._passed:
            self._passed[position] = None
            # What goes wrong is reported where that checkpoint is measured.
            with suppress(Exception), self._worker.at(position):
                model, step = self._worker.apart(position)
                with frozen(model):
                    found = Statistics(model, self.probe, memory_budget=self._memory_budget)
                    self._spot_check(found.jacobian, step)
        return self._passed[position]

    def _warn(self, once: str, text: str, category: type[UserWarning] = UserWarning) -> None:
        """Says nothing: reasons are reported together in the end."""


def _optimizers(model: nn.Module, contents: Contents) -> list[Optimizer]:
    """The optimizers that a Lightning module configures, as they were at the checkpoint.

    Raises:
        Unavailable: if they cannot be had.
    """
    configure = getattr(model, "configure_optimizers", None)
    if not callable(configure):
        raise Unavailable(
            "the optimizer is not known offline: expected a LightningModule with "
            f"configure_optimizers, got {type(model).__name__}"
        )
    if not contents.optimizers:
        raise Unavailable(
            "the checkpoint has no optimizer_states: save it with save_weights_only=False"
        )
    try:
        found = _flat(configure())
        if len(found) != len(contents.optimizers):
            raise ValueError(
                f"expected {len(contents.optimizers)} optimizers, as in the checkpoint, got "
                f"{len(found)}"
            )
        for optimizer, state in zip(found, contents.optimizers, strict=True):
            optimizer.load_state_dict(state)
    except Exception as error:
        raise Unavailable(
            f"the optimizer is not known: {type(model).__name__}.configure_optimizers, called "
            f"without a trainer, fails or does not fit the checkpoint ({told(error)})"
        ) from error
    return found


def _flat(configured: Any) -> list[Optimizer]:
    """The optimizers in what `configure_optimizers` returns."""
    if isinstance(configured, Mapping):
        return _flat(configured["optimizer"])
    if isinstance(configured, (list, tuple)):
        if len(configured) == 2 and all(isinstance(one, (list, tuple)) for one in configured):
            configured = configured[0]  # before the schedulers
        return [optimizer for one in configured for optimizer in _flat(one)]
    return [] if configured is None else [configured]


def _last(need: str) -> str:
    return need.rpartition(".")[2]


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
