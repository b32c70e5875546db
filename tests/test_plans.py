"""Fused plans against the trees that they stand for: values, gradients, second derivatives, dropout, kept bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import omnilora as ol
from omnilora.plans import elementwise, executor, native
from omnilora.plans.blocks import host
from omnilora.plans.node import Dropped, products
from omnilora.plans.normal import lower
from omnilora.plans.product import Drop, Line
from tests.tiny import shaken  # noqa: F401
