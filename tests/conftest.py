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
