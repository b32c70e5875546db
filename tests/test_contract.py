"""The contract over every card: nothing here names a method."""

import pytest
import torch

from omnilora.contract import checks_for
from omnilora.core.method import entries

CHECKS = [check for key in sorted(entries()) for check in checks_for(entries()[key])]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_contract(check):
    check.run()
