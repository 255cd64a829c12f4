"""Where the tasks of an analysis run: here, in processes, in anybody's executor or on Dask.

A task is one checkpoint. Each of these functions yields outcomes as they come, in any order.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, TypeAlias

from nettrace.differentiate import parse_bytes
from nettrace.offline.worker import Outcome, Plan, Worker

if TYPE_CHECKING:
    from distributed import Client

Outcomes: TypeAlias = Generator[Outcome, None, None]
#: The position of a checkpoint, and the names of measures.
Task: TypeAlias = tuple[int, tuple[str, ...]]
#: How often workers may die during one checkpoint.
DEATHS = 2
#: Seconds in which a cluster without workers may get one.
_PATIENCE = 60
_OF_MEMORY = (
    "a common cause is the lack of memory: take a smaller probe or memory_budget, or jobs=1"
)
#: Measuring sets random states and modes of the whole process, so that one may at a time.
_ALONE = threading.Lock()
#: The plan that this process works at, by its digest.
_KNOWN: dict[str, Shared] = {}
_TAKING = threading.Lock()
#: In a process of `processes`, where to note what checkpoint is in use.
_at: Any = None


class Shared:
    """A plan with its worker, made once in each process; pickled once, whatever is sent with it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @cached_property
    def worker(self) -> Worker:
        """The worker of this process."""
        return Worker(self._plan)

    @cached_property
    def pickled(self) -> bytes:
        """The plan.

        Raises:
            ValueError: if it cannot be pickled.
        """
        try:
            return pickle.dumps(self._plan)
        except Exception as error:
            raise ValueError(
                "the network, the probe or what they are made of cannot be sent to other "
                f"processes ({type(error).__name__}: {error}): give names that can be imported "
                "there, model='module:name' and probe='module:name' or 'path/to/file.py:name', or "
                "take jobs=1"
            ) from error

    def __reduce__(self) -> Any:
        return _received, (self.pickled,)


class _Received(Shared):
    """A plan that came from another process, unpickled when it is first asked for."""

    def __init__(self, data: bytes) -> None:
        self.pickled = data

    @cached_property
    def worker(self) -> Worker:
        """The worker of this process."""
        try:
            plan = pickle.loads(self.pickled)
        except Exception as error:
            raise ValueError(
                f"a worker cannot make the network or the probe ({type(error).__name__}: {error}): "
                "define them in a module that can be imported there, and give model='module:name' "
                "or 'path/to/file.py:name'"
            ) from error
        return Worker(plan)


def _received(data: bytes) -> Shared:
    digest = hashlib.sha256(data).hexdigest()
    with _TAKING:
        if digest not in _KNOWN:
            _KNOWN.clear()
            _KNOWN[digest] = _Received(data)
        return _KNOWN[digest]


def work(
    shared: Shared, position: int, names: tuple[str, ...], shunned: Iterable[int] = ()
) -> Outcome:
    """A task; see `Worker.measure`.

    Raises:
        Exception: whatever keeps this process from any task.
    """
    with _ALONE:
        return shared.worker.measure(position, names, shunned)


def look(shared: Shared, position: int) -> Outcome:
    """What the network gives at a checkpoint; see `Worker.look`.

    Raises:
        Exception: whatever keeps this process from any task.
    """
    with _ALONE:
        return shared.worker.look(position)


def here(shared: Shared, tasks: Sequence[Task]) -> Outcomes:
    """In this process, one by one."""
    for task in tasks:
        yield work(shared, *task)


def executed(
    shared: Shared, tasks: Sequence[Task], executor: Executor, workers: int, in_runs: bool
) -> Outcomes:
    """In an executor, in the order of steps, with a task or run more than workers on its way.

    Args:
        shared: the plan.
        tasks: what is to be done.
        executor: where.
        workers: how many it has.
        in_runs: whether to send some tasks together; see `runs`.

    Raises:
        Exception: whatever the executor raises, as when it is broken.
    """
    cut = runs(tasks, workers, in_runs)
    yield from _streamed(cut, lambda run: executor.submit(_work_run, shared, run), workers + 1)


def runs(tasks: Sequence[Task], workers: int, in_runs: bool) -> list[Sequence[Task]]:
    """Tasks one by one, or up to 8 neighbours together, at least 4 runs for each worker.

    Measures that compare with the look before are then dear only for the first of a run, whose
    neighbour another worker may have seen.
    """
    length = min(8, max(1, len(tasks) // (4 * workers))) if in_runs else 1
    return [tasks[k : k + length] for k in range(0, len(tasks), length)]


def _work_run(shared: Shared, run: Sequence[Task]) -> list[Outcome]:
    return [work(shared, *task) for task in run]


def _streamed(
    cut: Sequence[Sequence[Task]],
    submit: Callable[[Sequence[Task]], Future[list[Outcome]]],
    window: int,
    lost: type[BaseException] | tuple[type[BaseException], ...] = (),
    check: Callable[[], None] = lambda: None,
) -> Outcomes:
    """What tasks give, so many on their way; `check` raises where none is to come any more."""
    left = deque(cut)
    suspects: deque[Task] = deque()
    waiting: dict[Future[list[Outcome]], Sequence[Task]] = {}
    alone = False
    try:
        while left or suspects or waiting:
            while left and len(waiting) < window:
                run = left.popleft()
                waiting[submit(run)] = run
            if not waiting:
                run = [suspects.popleft()]
                waiting[submit(run)] = run
                alone = True  # so that no other can have killed its worker
            ended = wait(waiting, _PATIENCE, FIRST_COMPLETED).done
            if not ended:
                check()
            for future in ended:
                run = waiting.pop(future)
                try:
                    yield from future.result()
                except lost as error:
                    if alone:
                        yield _died(run[0], str(error))
                    else:
                        suspects.extend(run)
                alone = False
    finally:
        for future in waiting:
            future.cancel()


def _died(task: Task, how: str) -> Outcome:
    return Outcome(task[0], failure=f"{how}: {_OF_MEMORY}")


# Processes ----------------------------------------------------------------------------------------


def processes(shared: Shared, tasks: Sequence[Task], jobs: int) -> Outcomes:
    """In processes of its own; a worker that dies is replaced, and its checkpoint tried once more.

    Each has a run of checkpoints, since measures that compare ask for the one before; who has done
    his own takes half of what another has left. A checkpoint whose weights were in use when workers
    died is then shunned by those that compare with it.

    Raises:
        RuntimeError: if processes cannot be started.
    """
    jobs = min(jobs, len(tasks))
    cuts = [k * len(tasks) // jobs for k in range(jobs + 1)]
    queues = [deque(tasks[a:b]) for a, b in pairwise(cuts)]
    pools = [_Process(shared.pickled) for _ in queues]
    waiting: dict[Future[Outcome], int] = {}
    deaths = dict.fromkeys((position for position, _ in tasks), 0)

    def send(k: int) -> None:
        if not queues[k]:
            longest = max(queues, key=len)
            for _ in range(len(longest) // 2):  # the first of them is being done
                queues[k].appendleft(longest.pop())
        if queues[k]:
            shunned = tuple(position for position, number in deaths.items() if number >= DEATHS)
            waiting[pools[k].submit(queues[k][0], shunned)] = k

    try:
        for k in range(len(pools)):
            send(k)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                k = waiting.pop(future)
                task = queues[k][0]
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    pools[k].check_started()
                    fatal = pools[k].at.value
                    pools[k].kill()
                    pools[k] = _Process(shared.pickled)
                    deaths[fatal if deaths.get(fatal, DEATHS) < DEATHS else task[0]] += 1
                    if deaths[task[0]] < DEATHS:
                        send(k)
                        continue
                    outcome = _died(task, f"{DEATHS} workers died during this checkpoint")
                queues[k].popleft()
                send(k)
                yield outcome
    finally:
        for pool in pools:
            pool.kill()


class _Process:
    """A pool of one process, so that it is known during which task it died."""

    def __init__(self, data: bytes) -> None:
        context = get_context("spawn")
        #: The position of the checkpoint whose weights are in use; -1 for none.
        self.at = context.RawValue("q", -1)
        self._pool = ProcessPoolExecutor(1, context, _begin, (data, self.at))
        self._started = self._pool.submit(os.getpid)

    def submit(self, task: Task, shunned: tuple[int, ...]) -> Future[Outcome]:
        try:
            return self._pool.submit(_work, *task, shunned)
        except BrokenProcessPool as error:  # between two tasks
            failed: Future[Outcome] = Future()
            failed.set_exception(error)
            return failed

    def check_started(self) -> None:
        """Checks, once this process is dead, that it did not end by itself before it began.

        Raises:
            RuntimeError: if it did.
        """
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown()
        killed = any((process.exitcode or 0) < 0 for process in processes)  # by a signal
        if self._started.exception() is not None and not killed:
            raise RuntimeError(
                "worker processes end before they begin, for the reason that they have printed: "
                "a script has to guard what it does by if __name__ == '__main__':, because they "
                "import it; or take jobs=1"
            )

    def kill(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def _begin(data: bytes, at: Any) -> None:
    """Takes the plan to work at, and ends with the process that sent it."""
    global _at
    _at = at
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which that process obeys for all
    _received(data)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(position: int, names: tuple[str, ...], shunned: tuple[int, ...]) -> Outcome:
    (shared,) = _KNOWN.values()
    shared.worker.note = lambda place: setattr(_at, "value", place)
    return work(shared, position, names, shunned)


# Dask ---------------------------------------------------------------------------------------------


def on_dask(
    shared: Shared, tasks: Sequence[Task], cluster: str | Client, need: int, in_runs: bool
) -> Outcomes:
    """On a Dask cluster, one task at a time in each worker process.

    Args:
        shared: the plan.
        tasks: what is to be done.
        cluster: the scheduler's address, or a client.
        need: how many bytes a task may take. Where workers have a resource "MEMORY", in bytes, so
            much of it is asked for.
        in_runs: whether to send some tasks together; see `runs`.

    Raises:
        ImportError: if Dask is not installed.
        RuntimeError: if all workers are lost, and none comes in their place.
        ValueError: if the address is none, no worker has the memory, or there is none.
    """
    try:
        from distributed import Client
        from distributed.comm.addressing import resolve_address
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ImportError("Dask is not installed: pip install 'nettrace[scale]'") from error
    given = cluster if isinstance(cluster, Client) else None
    if isinstance(cluster, str):
        try:
            resolve_address(cluster)  # a client that fails at this would never let the process end
        except (ValueError, OSError) as error:
            raise ValueError(
                "expected the address of a Dask scheduler, such as tcp://host:8786, got "
                f"{cluster!r}: {error}"
            ) from error
    client: Any = given or Client(cluster, set_as_default=False)  # type: ignore[no-untyped-call]
    try:
        with suppress(TimeoutError):  # as while workers that were killed are started anew
            client.wait_for_workers(1, timeout=_PATIENCE)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        resources = _resources(list(workers), need)
        executor = client.get_executor(pure=False, resources=resources)

        def check() -> None:
            try:
                client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError:
                raise RuntimeError(
                    f"the Dask cluster has had no worker for {_PATIENCE} seconds: start some and "
                    "analyse once more, which goes on where this ended"
                ) from None

        # Made there of bytes, so that it is made again wherever it is lost.
        plan = client.submit(_received, shared.pickled, pure=False)
        yield from _streamed(
            runs(tasks, len(workers), in_runs),
            lambda run: executor.submit(_work_run, plan, run),
            len(workers) + 1,
            KilledWorker,
            check,
        )
    finally:
        if given is None:
            client.close()


def _resources(workers: Iterable[Any], need: int) -> dict[str, float]:
    """What a task asks of a worker.

    Raises:
        ValueError: if none has it.
    """
    declared = [w["resources"]["MEMORY"] for w in workers if "MEMORY" in w.get("resources", {})]
    limits = declared or [w["memory_limit"] or need for w in workers]
    if not limits:
        raise ValueError("the Dask cluster has no workers: start some, as by `dask worker ADDRESS`")
    short = max(limits) < need if declared else min(limits) < need
    if short:
        raise ValueError(
            f"a task may take {need / 2**30:.2f} GiB, the memory_budget and what the network takes "
            f"itself, and {'no worker has more than' if declared else 'a worker has'} "
            f"{(max if declared else min)(limits) / 2**30:.2f} GiB: pass a smaller memory_budget, "
            "or start fewer and larger workers"
        )
    return {"MEMORY": need} if declared else {}


def bytes_of_task(memory_budget: int | str, weights: int) -> int:
    """How much memory a task takes: its budget, and the weights a few times over.

    They are there as they are loaded, in the network, in the copy that is put back afterwards, and
    in what is kept of earlier checkpoints.
    """
    return parse_bytes(memory_budget) + 4 * weights
