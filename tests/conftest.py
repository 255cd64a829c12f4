import logging
from collections.abc import Iterator

import hypothesis
import pytest
import torch

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
