"""Analysing checkpoints: which are to be measured, by whom, and where the records go."""

from __future__ import annotations

import operator
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nettrace import checkpoints as saved
from nettrace import locate
from nettrace.checkpoints import Checkpoint, CheckpointError, reading
from nettrace.checkpoints.building import Model
from nettrace.differentiate import parse_bytes
from nettrace.measures import resolve
from nettrace.offline import pools
from nettrace.offline.done import GENERATION, MODIFIED, SIZE, Recorded
from nettrace.offline.witness import agree
from nettrace.offline.worker import Outcome, Plan
from nettrace.probe import Probe, check_probes, fingerprint
from nettrace.store import TraceWriter
from nettrace.store import open as open_trace
from nettrace.store.provenance import name_of, of_probe
from nettrace.tracer import chosen

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client


@dataclass(frozen=True)
class Analysis:
    """What `analyze` did; printed as a report.

    Args:
        folder: of the trace.
        done: the steps that were measured.
        skipped: the steps of which all was done before.
        failed: by checkpoint, why it could not be measured.
        missing: by measure, why it is missing where it is, at the first such step.
        seconds: how long it took.
        anew: why nothing that was measured before counts as done, if that is so.
    """

    folder: Path
    done: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    failed: Mapping[Path, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    anew: str | None = None

    @property
    def trace(self) -> xr.Dataset:
        """All that the trace holds, as `nettrace.open` gives it."""
        return open_trace(self.folder)

    def __str__(self) -> str:
        counts = [f"{len(self.done)} measured in {self.seconds:.1f} s"]
        counts += [f"{len(self.skipped)} done before"] * bool(self.skipped)
        counts += [f"{len(self.failed)} failed"] * bool(self.failed)
        total = len(self.done) + len(self.skipped) + len(self.failed)
        lines = [
            f"{total} checkpoint{'s' * (total != 1)}: {', '.join(counts)}",
            f"the trace is in {self.folder}",
        ]
        lines += [f"measured anew: {self.anew}"] * (self.anew is not None)
        lines += [f"failed: {path}: {reason}" for path, reason in self.failed.items()]
        lines += [f"missing: {name}: {reason}" for name, reason in self.missing.items()]
        return "\n".join(lines)


def analyze(
    checkpoints: str | Path | Iterable[str | Path],
    probe: Probe | Mapping[str, Probe] | str,
    measures: str | Iterable[str] = ("ntk", "fisher", "collective", "loss"),
    *,
    model: Model = None,
    to: str | Path | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    dask: str | Client | None = None,
    threads: int | None = None,
    memory_budget: int | str = "2GiB",
    max_seconds: float | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    retry: bool = False,
    progress: bool | Literal["always"] = True,
    modules: Iterable[str] = (),
) -> Analysis:
    """Measures checkpoints as a callback would have measured the network while it was trained.

    A checkpoint saved at step k gives, bit for bit, what a `Tracer` with these measures, this seed
    and as many threads wrote at step k. Measures that compare looks compare with the first of all
    these checkpoints and with the one before, whoever measures those, and whether it was before.
    Those that need an optimizer get the one that a LightningModule configures, with the
    checkpoint's states.

    What is done is not done again: what was asked for of a checkpoint of the same step, size and
    time of modification, with the same samples, likelihood, seed and network by name, if that still
    gives the same. Where any of these is another, all that was ever asked for of that checkpoint is
    measured anew. Whether the network, the probe's forward and its losses give what they gave is
    seen by a look at the first checkpoint that is done, to a thousandth: by a sum of the outputs
    and one of the losses, which the trace has beside each step. A checkpoint that cannot be
    measured is reported, and the others go on. What is written stays, whatever ends the analysis.

    In a process, one checkpoint is measured at a time, since that sets random states and modes of
    the whole process: an executor of threads, or a worker of Dask that has several, gains nothing
    over one.

    Args:
        checkpoints: files, folders and patterns, as for `nettrace.checkpoints.find`. All are of one
            run, as one that was resumed elsewhere; so a folder that is searched may hold one alone.
        probe: the samples, or several by name; or a name as for `nettrace.locate.probe`.
        measures: names of measures or of groups of them.
        model: a network to load the weights into, which is left as it is; a class or function that
            makes one, of the checkpoint's hyper-parameters as in `nettrace.checkpoints.build`; or
            "module:name" or "path/to/file.py:name" of either. By default, what the checkpoint says
            itself. Which parameters require a gradient is not in checkpoints.
        to: a folder for the trace; by default "analysis" in the folder that holds the first
            checkpoint, or beside that if it is called "checkpoints".
        jobs: how many processes to measure in; 1 for this one.
        executor: measures in its workers instead; it must be able to send what is given to them.
        dask: the address of a scheduler, or a client, to measure on its cluster instead. The
            nannies of Dask set MALLOC_TRIM_THRESHOLD_, with which torch returns its memory after
            each operation and may take two or three times as long: leave that out of their
            configuration, `distributed.nanny.pre-spawn-environ`.
        threads: how many each worker computes with. By default, the cores shared out among jobs,
            or as they are set.
        memory_budget: as in `nettrace.jacobian`, of each worker.
        max_seconds: as in `nettrace.Tracer`; without a limit by default.
        seed: for measures that draw random numbers; they draw the same at the same step.
        allow_pickle: whether the code that checkpoints may hold may be run. Only if their author is
            trusted.
        retry: whether to take again what is missing.
        progress: whether to show a bar where the standard error stream is a terminal, or "always".
        modules: those that define measures of one's own, for workers to import.

    Raises:
        CheckpointError: if there are no checkpoints, or those in a folder are of several runs.
        LocateError: if a name stands for nothing.
        ValueError: if a path is empty; if a measure is unknown; if the trace is of another probe;
            or if what is given cannot be sent to workers.
        OSError: if the trace cannot be written.

    Example:
        >>> import tempfile, torch, nettrace as nt
        >>> folder, network = tempfile.mkdtemp(), torch.nn.Linear(3, 2)
        >>> for step in (0, 10):
        ...     torch.save(network.state_dict(), f"{folder}/step={step}.pt")
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> analysis = nt.analyze(folder, probe, ["ntk/trace", "loss"], model=network)
        >>> analysis.done, analysis.trace.ntk_trace.dims
        ((0, 10), ('step',))
    """
    start = time.perf_counter()
    _check(jobs, threads, [executor, dask, jobs if jobs > 1 else None])
    parse_bytes(memory_budget)
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    for module in modules:
        locate.import_module(module)
    paths = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    if "" in (*paths, to):
        raise ValueError(
            "expected a path, got an empty text: is it a variable of the shell that is not set?"
        )
    found, broken = saved.find(paths, allow_pickle)
    _check_one_run(map(Path, paths), [*(one.path for one in found), *broken])
    failed = {path: _why(path, str(error)) for path, error in broken.items()}
    samples = locate.probe(probe) if isinstance(probe, str) else probe
    check_probes(samples)
    names = [measure.name for measure in chosen(measures, samples)]
    first = found[0].path if found else next(iter(failed))
    folder = _beside(first) if to is None else Path(to)
    digest = fingerprint(samples)
    provenance = {
        "probe": digest,
        "samples": of_probe(samples),
        "model": "as the checkpoint says" if model is None else name_of(model),
        "seed": seed,
    }
    if threads is None and jobs > 1:
        threads = max(1, _cores() // jobs)
    plan = Plan(
        tuple(found),
        model,
        probe,
        digest,
        seed,
        memory_budget,
        max_seconds,
        threads,
        allow_pickle,
        modules,
    )
    shared = pools.Shared(plan)
    recorded = Recorded(folder, found, provenance)
    anew, lost = _looked(recorded, shared)
    failed |= {found[place].path: _why(found[place].path, text) for place, text in lost.items()}
    todo = recorded.left(names, retry)
    tasks = [(place, left) for place, left in enumerate(todo) if left and place not in lost]
    skipped = tuple(
        found[place].step for place, left in enumerate(todo) if not left and place not in lost
    )
    missing = recorded.missing(todo, names)
    if not tasks:
        seconds = time.perf_counter() - start
        return Analysis(folder, (), skipped, failed, _first(missing), seconds, anew)
    outcomes = _run(shared, plan, tasks, jobs, executor, dask)
    told: dict[str, Any] = {
        **provenance,
        GENERATION: recorded.generation,
        "data": probe if isinstance(probe, str) else repr(samples),
        "checkpoints": str(Path(first).parent),
    }
    if threads is not None:
        told["threads"] = threads
    attempt = uuid.uuid4().hex
    writers: dict[tuple[str, ...], TraceWriter] = {}
    done: list[int] = []
    try:
        for outcome in _shown(outcomes, len(tasks), progress):
            checkpoint, asked = found[outcome.position], todo[outcome.position]
            if outcome.failure is not None:
                failed[checkpoint.path] = _why(checkpoint.path, outcome.failure)
                continue
            if asked not in writers:  # each part says what was asked for at all of its steps
                writers[asked] = TraceWriter(
                    folder, attempt, start=None, measures=list(asked), **told
                )
            writers[asked].write(outcome.records, _coordinates(checkpoint, outcome))
            done.append(checkpoint.step)
            missing += [
                (checkpoint.step, record.name, reason)
                for record in outcome.records
                for reason in filter(None, [record.missing, *record.missing_on.values()])
            ]
    finally:
        outcomes.close()
        for writer in writers.values():
            writer.sync()
            writer.close()
    seconds = time.perf_counter() - start
    return Analysis(folder, tuple(sorted(done)), skipped, failed, _first(missing), seconds, anew)


def _looked(recorded: Recorded, shared: pools.Shared) -> tuple[str | None, dict[int, str]]:
    """Looks whether the network gives what it gave where something is done; if not, nothing is.

    Returns:
        Why nothing is done, and why checkpoints could not be looked at, by position.
    """
    lost: dict[int, str] = {}
    for place, witness in recorded.witnesses():
        outcome = pools.look(shared, place)
        if outcome.failure is None:
            if agree(outcome.witness, witness):
                break
            recorded.generation += 1
            return "the network, its forward or its losses give other values than before", lost
        lost[place] = outcome.failure
    return None, lost


def _run(
    shared: pools.Shared,
    plan: Plan,
    tasks: Sequence[pools.Task],
    jobs: int,
    executor: Executor | None,
    dask: str | Client | None,
) -> pools.Outcomes:
    asked = {name for _, names in tasks for name in names}
    in_runs = any((m.reference or ("",))[0] == "previous" for m in resolve(asked))
    if executor is not None:
        workers = getattr(executor, "_max_workers", None) or _cores()
        return pools.executed(shared, tasks, executor, workers, in_runs)
    if dask is not None:
        need = pools.bytes_of_task(plan.memory_budget, max(c.size for c in plan.checkpoints))
        return pools.on_dask(shared, tasks, dask, need, in_runs)
    return pools.processes(shared, tasks, jobs) if jobs > 1 else pools.here(shared, tasks)


def _shown(
    outcomes: Iterable[Outcome], total: int, progress: bool | Literal["always"]
) -> Iterator[Outcome]:
    """The same, with a bar."""
    from tqdm import tqdm

    disable = None if progress is True else not progress  # None where there is no terminal
    with tqdm(total=total, unit=" checkpoints", disable=disable, smoothing=0.1) as bar:
        for outcome in outcomes:
            yield outcome
            bar.update()


def _check(jobs: int, threads: int | None, ways: Sequence[object]) -> None:
    for name, number in (("jobs", jobs), ("threads", threads)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"expected {name} to be an integer of at least 1, got {number!r}")
    if sum(way is not None for way in ways) > 1:
        raise ValueError("expected one of jobs, executor and dask, got more: they do the same")


def _why(path: Path, text: str) -> str:
    """What is wrong with a checkpoint, for where its path is said already."""
    return text.removeprefix(f"{path} ")


def _first(missing: Iterable[tuple[int, str, str]]) -> dict[str, str]:
    """By measure, the reason at the first step where it is missing."""
    found: dict[str, str] = {}
    for _, name, reason in sorted(missing, key=operator.itemgetter(0)):
        found.setdefault(name, reason)
    return found


def _check_one_run(given: Iterable[Path], found: Sequence[Path]) -> None:
    """Checks that what lies within a folder that was given lies in one folder."""
    for folder in given:
        within = {_holder(path): path for path in found if folder in path.parents}
        if len(within) > 1:
            # A folder is searched with all that lies within, so that a pattern is to be given.
            alone = [
                f"'{folder / re.sub('[0-9]+', '*', path.name)}'"
                if holder == folder
                else str(holder)
                for holder, path in sorted(within.items())
            ]
            raise CheckpointError(
                f"{folder} has checkpoints in {len(alone)} folders, and a trace is of one run: "
                f"analyse each by itself, {', '.join(alone[:8])}{', ...' * (len(alone) > 8)}; or, "
                "if they are of one run, as of one that was resumed, name all of them one by one"
            )


def _holder(checkpoint: Path) -> Path:
    """The folder of all checkpoints of a run, each of which may have a folder of its own."""
    name = Path(checkpoint.name)
    for told in (reading.step_in_name, reading.epoch_in_name):
        if told(name) is None and told(checkpoint) is not None:
            return checkpoint.parent.parent
    return checkpoint.parent


def _coordinates(checkpoint: Checkpoint, outcome: Outcome) -> dict[str, float]:
    return {
        **checkpoint.coordinates,
        SIZE: checkpoint.size,
        MODIFIED: checkpoint.modified,
        **{name: total for name, (total, _) in outcome.witness.items()},
    }


def _beside(checkpoint: Path) -> Path:
    holder = checkpoint.absolute().parent
    folder = (holder.parent if holder.name == "checkpoints" else holder) / "analysis"
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
