"""The Lightning callback that fits last-layer uncertainties at the end of a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nettrace.batch import Select
from nettrace.callbacks.landscape import check_whole
from nettrace.callbacks.lightning import Callback, silenced
from nettrace.callbacks.progress import announced
from nettrace.callbacks.request import report
from nettrace.callbacks.samples import in_order
from nettrace.inference import LikelihoodName, check_likelihood
from nettrace.likelihood import Likelihood
from nettrace.probe import Forward
from nettrace.recording import OnError
from nettrace.uncertainty import Uncertainties, fit, load
from nettrace.uncertainty.calibration import Objective

#: What the file beside the checkpoints is called.
FILE = "uncertainties.pt"


class LastLayerUncertainty(Callback):
    """Fits uncertainties of the network's predictions when its training has ended.

    The covariance is of the training data, in the order of the data set; alpha and the ridge are
    calibrated on the first validation data set, or on the training data where there is none. It is
    the last thing that happens in a fit, so that averaged weights are in place. The trainer's
    loaders are not iterated, and network and random streams are left as they are; what fails is
    warned of, and never ends the run. Of several processes, each takes its share of the samples.

    Afterwards `uncertainties` predicts with variances. Checkpoints that are saved from then on
    hold it as this callback's state, and a file `uncertainties.pt` lies beside those of the run,
    which `nettrace.uncertainty.load` reads.

    Args:
        to: a folder for that file; by default that of the trainer's checkpoints, if it saves any.
        head: this and what follows as in `nettrace.uncertainty.fit`.
        likelihood: likewise.
        forward: likewise.
        select: likewise.
        ridge: likewise.
        alpha: likewise.
        objective: likewise.
        on_error: "record" warns and lets the run go on; "raise" raises.

    Attributes:
        uncertainties: what was fitted, or is in the checkpoint that was loaded; None before.

    Example:
        `Trainer(callbacks=[LastLayerUncertainty()]).fit(model, train, validation)`
    """

    def __init__(
        self,
        *,
        to: str | Path | None = None,
        head: str | None = None,
        likelihood: LikelihoodName | Likelihood | None = None,
        forward: Forward | None = None,
        select: Select | None = None,
        ridge: float | None = None,
        alpha: float | Tensor | None = None,
        objective: Objective = "nll",
        on_error: OnError = "record",
    ) -> None:
        super().__init__()
        check_likelihood(likelihood)
        if to is not None and not isinstance(to, (str, Path)):
            raise TypeError(f"expected to= to be a folder's path, got {type(to).__name__}")
        if on_error not in ("record", "raise"):
            raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")
        self.to = to
        self.on_error: OnError = on_error
        self._functions: dict[str, Any] = {"forward": forward, "select": select}
        self._options: dict[str, Any] = {
            **{"head": head, "likelihood": likelihood, "ridge": ridge, "alpha": alpha},
            **{"objective": objective, **self._functions},
        }
        self._fitted: Uncertainties | None = None
        self._state: dict[str, Any] | None = None
        self._module: Any = None
        self._said: set[str] = set()

    @property
    def uncertainties(self) -> Uncertainties | None:
        """What was fitted, or is in the checkpoint that was loaded; None before."""
        if self._fitted is None and self._state is not None and self._module is not None:
            self._fitted = load(self._state, self._module, **self._functions)
        return self._fitted

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Notes the network, of which a checkpoint may have uncertainties."""
        self._module = pl_module

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets go of what was fitted to earlier weights."""
        self._fitted = self._state = None
        self._said = set()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fits them, and saves them."""
        with self._spared("cannot fit uncertainties"), ExitStack() as stack:
            remedy = "load a checkpoint in one process, and call nettrace.uncertainty.fit"
            check_whole(trainer, remedy)
            stack.enter_context(announced(trainer, "nettrace fits uncertainties"))
            stack.enter_context(silenced(pl_module))
            ranks = (trainer.global_rank, trainer.world_size)

            def batches(loaders: Any, what: str) -> Any:
                return stack.enter_context(in_order(trainer, pl_module, loaders, what, ranks))

            training = trainer.train_dataloader
            if isinstance(training, (dict, list, tuple)) and len(training) > 1:
                raise TypeError(
                    f"there are {len(training)} training loaders, whose batches the network may "
                    "take in any way: call nettrace.uncertainty.fit after the training"
                )
            validation = trainer.val_dataloaders
            held_out = batches(validation, "validation") if _any(validation) else None
            self._fitted = fit(
                pl_module,
                batches(training, "training"),
                held_out,
                distributed=trainer.world_size > 1,
                **self._options,
            )
            self._state = None
        if self._fitted is not None and trainer.is_global_zero:
            with self._spared("cannot save uncertainties"):
                self._save(trainer, self._fitted)

    def state_dict(self) -> dict[str, Any]:
        """What was fitted, if it was."""
        if self._fitted is not None:
            return {"uncertainties": self._fitted.state_dict()}
        return {"uncertainties": self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up."""
        self._fitted, self._state = None, state_dict.get("uncertainties")

    def _save(self, trainer: Any, found: Uncertainties) -> None:
        keeper = trainer.checkpoint_callback
        folder = self.to if keeper is None or self.to is not None else keeper.dirpath
        if folder is None:
            return
        if "://" in str(folder):
            raise ValueError(f"{folder} is no local folder: pass to= with one")
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        found.save(fresh)
        os.replace(fresh, path)

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            report(self, what, error, self._said)


def _any(loaders: Any) -> bool:
    return loaders is not None and not (isinstance(loaders, (list, tuple, dict)) and not loaders)
