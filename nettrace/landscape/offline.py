"""Probes of the landscape around the networks of checkpoints, after the training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nettrace import checkpoints as saved
from nettrace import locate
from nettrace.checkpoints.building import Model
from nettrace.checkpoints.networks import Networks
from nettrace.landscape.folder import open as open_results
from nettrace.landscape.prober import Functions, Prober
from nettrace.missing import told, warn_missing
from nettrace.probe import Probe
from nettrace.recording import OnError

if TYPE_CHECKING:
    import xarray as xr


def probe_checkpoints(
    checkpoints: str | Path | Iterable[str | Path],
    functions: Functions,
    probe: Probe,
    *,
    to: str | Path,
    model: Model = None,
    seconds: float | None = None,
    progress: bool = True,
    on_error: OnError = "record",
    seed: int = 0,
    allow_pickle: bool = False,
) -> dict[str, xr.Dataset]:
    """Probes the landscape around each checkpoint, as `LandscapeProbe` does in the training.

    A checkpoint of step k gives what the callback gives at step k with the same samples, and the
    same files; those that are whole are not made again, whoever made them. A checkpoint that cannot
    be probed is warned of, and the others go on.

    Args:
        checkpoints: files, folders and patterns, as for `nettrace.checkpoints.find`.
        functions: what to call, as in `Prober`.
        probe: the samples, with targets.
        to: a folder for results.
        model: a network to load the weights into, which is left as it is; a class or function that
            makes one; or the name of either, as in `nettrace.analyze`. By default, what the
            checkpoint says itself.
        seconds: how long all functions together may take at a checkpoint.
        progress: whether to show progress bars.
        on_error: "record" notes why a result is missing, and warns; "raise" raises.
        seed: of what is random in a network and in no checkpoint.
        allow_pickle: whether the code that checkpoints may hold may be run. Only if their author is
            trusted.

    Returns:
        What `nettrace.landscape.open` finds in the folder.

    Raises:
        CheckpointError: if there are no checkpoints, or none can be used.
        LocateError: if what is given is no network, and makes none.
        ValueError: if an argument is out of range.
        KeyboardInterrupt: if it was interrupted; what there was by then is kept.

    Example:
        >>> import tempfile, torch, nettrace as nt
        >>> from nettrace.landscape import probe_checkpoints, slice_1d
        >>> folder, network = tempfile.mkdtemp(), torch.nn.Linear(3, 2)
        >>> for step in (0, 10):
        ...     torch.save(network.state_dict(), f"{folder}/step={step}.pt")
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> found = probe_checkpoints(
        ...     folder, slice_1d, probe, to=f"{folder}/slices", model=network, progress=False
        ... )
        >>> dict(found["slice_1d"].loss.sizes)
        {'step': 2, 'x': 51}
    """
    prober = Prober(functions, probe, to=to, seconds=seconds, progress=progress, on_error=on_error)
    found, broken = saved.find(checkpoints, allow_pickle)
    failed: dict[Path, BaseException] = {**broken}
    if found:
        networks = Networks(found[0], model, seed, allow_pickle)
    for checkpoint in found:
        try:
            network, _ = networks.load(checkpoint)
        except locate.FAILURES as error:  # of code of the user's, too
            failed[checkpoint.path] = error
        else:
            prober(network, checkpoint.step)
    for path, failure in failed.items():
        if on_error == "raise" or len(failed) == len(found) + len(broken):
            raise failure
        warn_missing(f"{path} cannot be probed: {told(failure)}", stacklevel=2)
    return open_results(to)
