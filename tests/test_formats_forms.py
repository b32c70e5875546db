"""The forms that only files bring: the contract of all forms, on kinds of layers where they make sense (convolutions are grouped there)."""

import pytest

import omnilora as ol
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.lycoris import InputDoRA, Kronecker, OutputOFT, TuckerLoHa, TuckerLoRA, WeightScale
from omnilora.parameterizations.lycoris_products import ButterflyOFT, ProductLoRA
from omnilora.parameterizations.neumann import NeumannOFT

ALL = ("linear", "conv")
FORMS = [
    (TuckerLoRA(2, 5.0), ALL), (TuckerLoHa(2, 5.0), ALL), (InputDoRA(LoRA(2, 5.0)), ALL), (WeightScale("output"), ALL),
    (WeightScale("input"), ("linear", "conv", "transposed")), (Kronecker(2, 5.0, 0.0, 1, 1, "factored", "factored"), ALL),
    (Kronecker(2, 5.0, 0.0, 1, 1, "factored", "tucker"), ALL), (Kronecker(2, 5.0), ALL),
    (OutputOFT(7), ("linear", "transposed")), (OutputOFT(2, 0.01, True), ("conv", "embedding", "slice")),
    (ButterflyOFT(4, 1, 0.05, True), ("slice",)), (ButterflyOFT(2, 1), ("conv", "embedding")), (ProductLoRA(2, 5.0), ("linear", "embedding")),
    (NeumannOFT(3, 5), ALL),
]  # fmt: skip


@pytest.mark.parametrize(("how", "kinds"), FORMS, ids=lambda v: type(v).__name__ if not isinstance(v, tuple) else "")
def test_contract(how, kinds):
    assert ol.check_parameterization(how, kinds=kinds) >= 17
