"""Fixtures that several files share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Numbers that do not depend on how work is shared: files that need it say ``usefixtures("one_thread")``."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
