import logging
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

import nettrace as nt
from nettrace.measures import registry
from nettrace.window import WeightWindow

# Times say nothing on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The models are tiny: threads would only wait for each other, and where other processes have the
# cores, that makes the tests several times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[str]]:
    """What nettrace logs, where it would warn if warnings were not errors: by default, nothing.

    A test that expects something takes it from the list.
    """
    texts: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Kept()
    logging.getLogger("nettrace").addHandler(handler)
    yield texts
    logging.getLogger("nettrace").removeHandler(handler)
    assert texts == [], "nettrace warned, and no test expected it"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what a test registers: others take all the measures that there are."""
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))


@pytest.fixture
def seen(registered: None) -> None:
    """Measures that tell what a window of weights holds: "seen/weights" and so on."""
    options: Any = {"needs": ["window"], "grouped": False}

    @nt.measure("seen/weights", dims=["snapshot", "weight"], **options)
    def weights(window: WeightWindow) -> Tensor:
        """The weights."""
        return torch.cat([window.rows(name) for name in window.names], 1)

    notes: dict[str, Callable[[WeightWindow], Any]] = {
        "steps": lambda window: list(window.steps),
        "samples": lambda window: window.samples,
        "rates": lambda window: window.learning_rates,
        "population": lambda window: [window.population or 0],
    }
    for name, find in notes.items():

        def noted(window: WeightWindow, find: Callable[[WeightWindow], Any] = find) -> Any:
            """What is noted beside them."""
            return np.asarray(find(window))

        dims = ["number" if name == "population" else "snapshot"]
        nt.measure(f"seen/{name}", dims=dims, **options)(noted)
