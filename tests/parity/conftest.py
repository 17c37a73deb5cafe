"""What the runs of this folder have in common."""

import pytest
from torch.utils.data import _utils


@pytest.fixture(autouse=True, scope="session")
def _worker_processes_are_not_waited_for_long() -> None:
    """After an error a DataLoader waits for its workers, five seconds unless told otherwise, when it is collected."""
    _utils.MP_STATUS_CHECK_INTERVAL = 0.2
