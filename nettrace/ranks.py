"""Several processes that measure together, each on its share of the samples.

All make the same calls in the same order. Before any data is exchanged they tell each other whether
all is well, so that an error in one is raised in all, and none waits for what never comes.
"""

from __future__ import annotations

import io
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy

from nettrace.missing import warn_missing
from nettrace.unwrapped import is_main_process, is_spread

T = TypeVar("T")

#: Seconds that one of several processes waits for the others to come to a record.
PATIENCE = 120.0
#: Seconds after which that is said.
_TOLD = 5.0
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LostProcessError(RuntimeError):
    """Another process does not answer any more."""


class Ranks:
    """This process alone; what several do in its place is in `Several`.

    Attributes:
        number: of this process.
        count: of all.
    """

    number = 0
    count = 1
    #: The fingerprints of their probes.
    probes: Set[str] = frozenset()
    #: Why the others cannot be reached any more, if that is so.
    lost = ""

    def check(self) -> None:
        """Checks that all are to measure on one probe.

        Raises:
            ValueError: if they are not.
        """
        if len(self.probes) > 1:
            raise ValueError(
                f"{self.count} processes measure together, on {len(self.probes)} probes: give all "
                "of them the same, as by drawing it from a seed; each measures its share of it"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done in here succeeds in all processes, or fails in all with one error."""
        yield

    def say(self, value: T) -> T:
        """What the first process has."""
        return value

    def each(self, value: T) -> list[T]:
        """What each process has, in their order."""
        return [value]

    def join(self, rows: Tensor) -> Tensor:
        """Rows (N, ...) of all processes one after the other; each may have another number."""
        return rows

    def place(self, count: int) -> slice:
        """Where so many rows of this process's are among those of all."""
        return slice(0, count)

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors over the processes, in place."""

    def pass_on(self, value: Callable[[], T], owner: int) -> T:
        """What one process makes, which holds tensors; in the others, a copy."""
        return value()

    def same_(self, tensors: Sequence[Tensor]) -> None:
        """Writes the first process's values to tensors."""

    def share(self, count: int) -> slice:
        """Which of so many samples are this process's; of evenly sized shares, in order."""
        first, end = (count * r // self.count for r in (self.number, self.number + 1))
        return slice(first, end)


#: Where there is one process, or one measures by itself.
ALONE = Ranks()


class Several(Ranks):
    """The processes of the default group of `torch.distributed`.

    Args:
        device: on which tensors are exchanged.

    Raises:
        LostProcessError: by all methods, once one of them has failed to reach the others.
    """

    def __init__(self, device: torch.device) -> None:
        self.number, self.count = distributed.get_rank(), distributed.get_world_size()
        self._device = device
        self._agreed: BaseException | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done in here succeeds in all processes, or fails in all with one error.

        That of the first process that fails.
        """
        try:
            yield
        except Exception as error:
            if error is self._agreed or self.lost:
                raise
            self._meet(error)
        else:
            self._meet()

    def say(self, value: T) -> T:
        """What the first process has; once others are lost, what this has."""
        try:
            return self.each(value)[0]
        except LostProcessError:
            return value

    def each(self, value: T) -> list[T]:
        """What each process has, in their order."""
        self._meet()
        return self._each(value)

    def join(self, rows: Tensor) -> Tensor:
        """Rows (N, ...) of all processes one after the other; each may have another number."""
        lengths = self.each(len(rows))
        longest = rows.new_zeros((max(lengths), *rows.shape[1:]))
        longest[: len(rows)] = rows
        found = [torch.empty_like(longest) for _ in lengths]
        with self._reaching():
            distributed.all_gather(_real(found), _real([longest])[0])
        return torch.cat([one[:n] for one, n in zip(found, lengths, strict=True)])

    def place(self, count: int) -> slice:
        """Where so many rows of this process's are among those of all."""
        start = sum(self.each(count)[: self.number])
        return slice(start, start + count)

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors over the processes, in place."""
        self._meet()
        with self._reaching():
            for tensor in _real(tensors):
                # Some backends take contiguous tensors alone.
                flat = tensor.contiguous()
                distributed.all_reduce(flat)
                if flat is not tensor:
                    tensor.copy_(flat)

    def pass_on(self, value: Callable[[], T], owner: int) -> T:
        """What one process makes, which holds tensors; in the others, a copy."""
        tensors: list[Tensor] = []
        made: T | None = None
        error: Exception | None = None
        if self.number == owner:
            try:
                made = value()
            except Exception as failure:
                error = failure
        self._meet(error)
        text = _pickled(made, tensors)
        with self._reaching():
            about = [(text, [(t.shape, t.dtype, t.device.type) for t in tensors])]
            distributed.broadcast_object_list(about, owner, device=self._device)
            text, kinds = about[0]
            if self.number == owner:
                tensors = [t.to(self._device) for t in tensors]
            else:
                tensors = [torch.empty(s, dtype=d, device=self._device) for s, d, _ in kinds]
            for tensor in _real(tensors):
                distributed.broadcast(tensor, owner)
            if self.number != owner:
                devices = [self._device if self._device.type == k else k for _, _, k in kinds]
                tensors = [t.to(d) for t, d in zip(tensors, devices, strict=True)]
        return made if self.number == owner else _unpickled(text, tensors)  # type: ignore[return-value]

    def same_(self, tensors: Sequence[Tensor]) -> None:
        """Writes the first process's values to tensors."""
        self._meet()
        with self._reaching(), torch.no_grad():
            for tensor in _real(tensors):
                flat = tensor.detach().contiguous()
                distributed.broadcast(flat, 0)
                if self.number and not torch.equal(flat, tensor):
                    tensor.copy_(flat)

    def _each(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        with self._reaching():
            distributed.all_gather_object(found, value)
        return found

    def _meet(self, error: Exception | None = None) -> None:
        """Waits for all, and raises in all what some raise."""
        if self.lost:
            raise LostProcessError(self.lost) from error
        failed = torch.tensor([int(error is not None)], device=self._device)
        with self._reaching():
            distributed.all_reduce(failed)
        if not int(failed):
            return
        errors = self._each(None if error is None else _portable(error))
        first = next(number for number, one in enumerate(errors) if one is not None)
        raised = error if first == self.number else errors[first]
        assert raised is not None
        if first != self.number:
            raised.add_note(f"in process {first} of {self.count}")
        self._agreed = raised
        raise raised

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except NotImplementedError:  # of a kind of tensor that no process can send
            raise
        except Exception as error:
            self.lost = (
                f"the other processes cannot be reached any more ({type(error).__name__}: {error})"
            )
            raise LostProcessError(self.lost) from error


#: By purpose, the processes that have come, how often, and where the first of them writes.
_come: dict[str, Ranks] = {}
_calls: Counter[str] = Counter()
_folders: dict[str, str] = {}
#: How often each purpose was named.
_named: Counter[str] = Counter()


def purpose(name: str) -> str:
    """A name of its own for what processes do together: they name the same in the same order."""
    _named[name] += 1
    return f"{name} {_named[name]}"


def ranks(purpose: str, model: nn.Module, probe: Callable[[], str] = str) -> Ranks:
    """The processes that measure for a purpose together, or this alone.

    Each call waits until all have come, for at most `PATIENCE` seconds; if some do not, each goes
    on alone, then and later. It also goes on alone at steps where they have other weights.

    Args:
        purpose: the same in all of them.
        model: what is measured.
        probe: the fingerprint of what it is measured on; where it differs, `check` will raise.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    known = _come.get(purpose)
    if distributed.get_world_size() == 1 or known is ALONE:
        return ALONE
    if known is not None and known.lost:
        return known
    if not _all_come(purpose):
        _come[purpose] = ALONE
        return ALONE
    try:
        if known is None:
            device = next(model.parameters(), torch.empty(0)).device
            if distributed.get_backend() == "nccl":
                device = torch.device("cuda", torch.cuda.current_device())
            known = _come[purpose] = Several(device)
            known.probes = set(known.each(probe()))
        weights = known.each(_digest(model))
    except LostProcessError:  # which all that is measured will say
        return known or ALONE
    return known if weights.count(weights[0]) == len(weights) else ALONE


def by_first(key: str, work: Callable[[], T]) -> T | None:
    """What the first process makes by some work, while the others wait for it, which get copies.

    They wait by the process group's store, so that nothing is pending that could time out, for as
    long as the first works. If it does not begin within `PATIENCE` seconds, they go on.

    Args:
        key: the same in all processes, and another each time.
        work: done in the first process alone.

    Returns:
        In the others None if the first did not come, or failed.
    """
    place = f"nettrace/{key}"
    if is_main_process():
        made = None
        _tell(f"{place}/begun", b"")
        try:
            made = work()
        finally:
            _tell(f"{place}/done", pickle.dumps(made))
        return made
    with suppress(RuntimeError):  # of a store that is gone with the process that held it
        return _awaited(place, key)  # type: ignore[return-value]
    return None


def _tell(key: str, value: bytes) -> None:
    if distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):
            store = distributed.distributed_c10d._get_default_store()
            store.set(key, value)  # type: ignore[arg-type]  # which takes bytes, too


def _awaited(place: str, key: str) -> object:
    store, begun = distributed.distributed_c10d._get_default_store(), time.monotonic()
    while not store.check([f"{place}/begun"]):
        if time.monotonic() - begun > PATIENCE:
            warn_missing(
                f"the first of several processes did not come to work for the others in "
                f"{PATIENCE:.0f} s ({key}): call this in each, at the same steps"
            )
            return None
        time.sleep(0.002)
    while not store.check([f"{place}/done"]):
        time.sleep(0.02)
    return pickle.loads(store.get(f"{place}/done"))


def leads(purpose: str, folder: str) -> bool:
    """Whether this process writes to a folder: the first does, and those with one of their own."""
    if purpose not in _folders:
        _folders[purpose] = _come.get(purpose, ALONE).say(folder)
    return is_main_process() or folder != _folders[purpose]


def _all_come(purpose: str) -> bool:
    """Whether all processes call this for a purpose; all get one answer."""
    _calls[purpose] += 1
    key = f"nettrace/{purpose}/"
    try:
        store = distributed.distributed_c10d._get_default_store()
        found = _decided(store, f"{key}{_calls[purpose]}", purpose)
        with suppress(RuntimeError):  # of stores that cannot forget
            for part in ("come", "verdict"):
                store.delete_key(f"{key}{_calls[purpose] - 1}/{part}")
    except RuntimeError:  # of a store that is gone with the process that held it
        return False
    return found


def _decided(store: Any, key: str, purpose: str) -> bool:
    count = distributed.get_world_size()
    if store.add(f"{key}/come", 1) == count:
        return bool(store.compare_set(f"{key}/verdict", "", "all") == b"all")
    begun, told = time.monotonic(), False
    while (waited := time.monotonic() - begun) < PATIENCE:
        if store.check([f"{key}/verdict"]):
            return bool(store.get(f"{key}/verdict") == b"all")
        time.sleep(0.002)
        if waited > _TOLD and not told:
            told = True
            warn_missing(
                f"waiting for others of {count} processes to measure with this one, for "
                f"{PATIENCE:.0f} s at most ({purpose}): call the tracer in each, at the same steps"
            )
    found = bool(store.compare_set(f"{key}/verdict", "", "some") == b"all")
    if not found:
        warn_missing(
            f"not all of {count} processes came to measure together ({purpose}): this one "
            "measures what it has alone, now and later"
        )
    return found


def _digest(model: nn.Module) -> list[int]:
    """Sums of the bits of the parameters, but for those that are spread over all processes."""
    sums = [torch.zeros((), dtype=torch.int64)]
    for p in model.parameters():
        if is_lazy(p) or p.is_meta:
            continue
        own = p.detach()
        if is_spread(own):
            if own.device_mesh.size() == distributed.get_world_size():  # type: ignore[attr-defined]
                continue
            own = own.to_local()  # type: ignore[attr-defined]
        with suppress(RuntimeError, NotImplementedError):  # of kinds of tensors without such bits
            flat = own.flatten()
            flat = torch.view_as_real(flat) if flat.is_complex() else flat
            sums.append(flat.contiguous().view(_WHOLE[flat.itemsize]).sum(dtype=torch.int64))
    return [int(one) for one in torch.stack([one.to(sums[-1].device) for one in sums])]


class _Pickler(pickle.Pickler):
    """Leaves tensors out, which are sent apart."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj.detach().resolve_conj().contiguous())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        found: Tensor = self._tensors[pid]
        return found


def _pickled(value: Any, tensors: list[Tensor]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    return file.getvalue()


def _unpickled(text: bytes, tensors: Sequence[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(text), tensors).load()


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, of the same type if that is possible."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return again if isinstance(again, Exception) else RuntimeError(str(error))


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory seen as real numbers, which all backends take."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
