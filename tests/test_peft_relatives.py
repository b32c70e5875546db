"""PEFT's other types: ours loaded by PEFT, PEFT's loaded here, equal outputs, and the same bytes again."""

from __future__ import annotations

import warnings

import pytest
import torch
from golden.make import IDS, Net, stir

import omnilora as ol
from omnilora.core.method import Method
from omnilora.errors import NotExpressible
from omnilora.io.names import known
from omnilora.io.peft import to_peft
from omnilora.parameterizations.fourier import FourierFT
from omnilora.parameterizations.hadamard import HiRA, LoHa
from omnilora.parameterizations.kronecker import LoKr
from omnilora.parameterizations.lycoris import Kronecker, TuckerLoHa
from omnilora.parameterizations.neumann import NeumannOFT
from omnilora.parameterizations.orthogonal import BOFT, OFT
from omnilora.parameterizations.randlora import RandLoRA
from omnilora.parameterizations.scaling import IA3

peft = pytest.importorskip("peft")
warnings.filterwarnings("ignore")
MANY = ["q_proj", "v_proj"]


def run(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)


def close(a, b, tol=1e-5):
    assert float((a - b).norm() / b.norm()) <= tol


CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj", "conv", "proj"], rank_pattern={"v_proj": 1},
                                    alpha_pattern={"q_proj": 5}, modules_to_save=["norm"]),
    "loha-core": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "conv", "proj"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "fc_in", "conv", "proj"]),
    "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "fc_in"], decompose_both=True, decompose_factor=4),
    "lokr-whole": lambda: peft.LoKrConfig(r=9, alpha=3, target_modules=["q_proj", "conv"], decompose_factor=2),
    "lokr-core": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "conv"], use_effective_conv2d=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "v_proj", "conv", "proj"], feedforward_modules=["v_proj", "conv"]),
    "oft-series": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=MANY),
    "oft-series-3": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=MANY, num_cayley_neumann_terms=3),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=MANY, use_cayley_neumann=False, bias="oft_only"),
    "oft-conv": lambda: peft.OFTConfig(r=0, oft_block_size=2, target_modules=["proj", "table"], use_cayley_neumann=False),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=MANY[:1], bias="boft_only"),
    "randlora": lambda: peft.RandLoraConfig(r=2, randlora_alpha=3, target_modules=[*MANY, "fc_in"], projection_prng_key=5),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=20, scaling=7.0, random_loc_seed=11, target_modules=MANY,
                                            n_frequency_pattern={"v_proj": 9}),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=[*MANY, "conv", "proj"], rank_pattern={"v_proj": 1}),
    "hira-table": lambda: peft.HiraConfig(r=2, target_modules=["table"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["table"]),
    "ln": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}  # fmt: skip


def saved(config, path):
    """PEFT's model with numbers in all that trains, saved."""
    theirs = peft.get_peft_model(Net(), config)
    stir((n, p) for n, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(path)
    return theirs


def adapted(how, targets):
    model = Net()
    ol.adapt(model, Method("own", how), targets=targets)
    stir((n, p) for s in ol.slots(model) for n, p in s.tensors() if p.requires_grad)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_pefts_here_and_back(case, tmp_path):
    y = run(saved(CONFIGS[case](), tmp_path / "p"))
    model = Net()
    assert float((run(model) - y).norm() / y.norm()) > 1e-3
    ol.load(model, tmp_path / "p")
    close(run(model), y)
    path = ol.save(model, tmp_path / "o")
    assert (path / "adapter_config.json").exists(), "PEFT's folder is written again"
    close(run(peft.PeftModel.from_pretrained(Net(), str(path))), y)
    again = Net()
    assert ol.load(again, path)["base"] == "same bytes"
    assert torch.equal(run(again), run(model))
    second = ol.save(again, tmp_path / "o2")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


OURS = {
    "loha": (LoHa(2, 5.0), ["q_proj", "v_proj", "conv", "proj"]),
    "loha-core": (TuckerLoHa(2, 5.0), ["conv"]),
    "lokr": (LoKr(1, 5.0), ["q_proj", "fc_in", "conv", "proj"]),
    "lokr-both": (LoKr(1, 5.0, both=True), ["q_proj", "fc_in"]),
    "lokr-whole": (LoKr(9, 5.0, factor=2), ["q_proj", "conv"]),
    "kronecker": (Kronecker(1, 5.0, 0.0, 2, 2, "whole", "factored"), ["q_proj"]),
    "ia3-out": (IA3("output"), ["q_proj", "conv"]),
    "ia3-in": (IA3("input"), ["v_proj", "conv"]),
    "oft": (OFT(4), ["q_proj"]),
    "oft-table": (OFT(2), ["table", "proj"]),
    "oft-series": (NeumannOFT(4, 5), MANY[:1]),
    "boft": (BOFT(4, 1), ["q_proj"]),
    "randlora": (RandLoRA(2, 5.0, 0.0, 3), ["q_proj", "v_proj", "fc_in"]),
    "fourier": (FourierFT(11, 5.0, 3), MANY),
    "hira": (HiRA(2), ["q_proj", "v_proj", "conv"]),
    "hira-table": (HiRA(2), ["table"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case, tmp_path):
    model = adapted(*OURS[case])
    y = run(model)
    path = ol.save(model, tmp_path / "a")
    assert (path / "adapter_config.json").exists()
    close(run(peft.PeftModel.from_pretrained(Net(), str(path))), y)


def test_another_map_is_refused(tmp_path):
    for how, targets, why in [
        (Kronecker(1, 5.0, 0.0, 4, 1, "whole", "factored"), ["q_proj"], "divides"),
        (LoHa(2, 5.0), ["groups"], "groups"), (OFT(3), ["conv"], "kernel"), (OFT(4), ["q_proj", "fc_in"], "one for all"),
    ]:  # fmt: skip
        model = Net()
        ol.adapt(model, Method("own", how), targets=targets)
        with pytest.raises(NotExpressible, match=why):
            to_peft(known(Net(), ol.state(model)))
    for config, field in [(peft.OFTConfig(r=0, oft_block_size=4, target_modules=MANY, block_share=True), "block_share"),
                          (peft.OFTConfig(r=0, oft_block_size=4, target_modules=MANY, coft=True), "coft")]:  # fmt: skip
        theirs = peft.get_peft_model(Net(), config)
        theirs.save_pretrained(tmp_path / field)
        with pytest.raises(NotExpressible, match=field):
            ol.load(Net(), tmp_path / field)
    peft.get_peft_model(Net(), peft.OFTConfig(r=0, oft_block_size=3, target_modules=["conv"])).save_pretrained(tmp_path / "conv")
    with pytest.raises(NotExpressible, match="kernel"):
        ol.load(Net(), tmp_path / "conv")


def test_old_lokr_and_old_oft(tmp_path):
    """PEFT before 0.14 had no exclude_modules in LoKr's configuration, and trained it without α/r."""
    import json

    saved(CONFIGS["lokr"](), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "exclude_modules"}))
    with pytest.warns(UserWarning, match=r"before 0\.14"):
        ol.load_file(tmp_path / "a")
    saved(CONFIGS["oft"](), tmp_path / "b")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "b" / "adapter_model.safetensors"
    save_file({k.replace("oft_R.weight", "oft_r"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(NotExpressible, match=r"before 0\.16"):
        ol.load_file(tmp_path / "b")
    data = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**data, "exclude_modules": None, "new_count": 3}))
    with pytest.warns(UserWarning, match="new_count"):
        ol.load_file(tmp_path / "a")
