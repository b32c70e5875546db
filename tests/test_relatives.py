"""Relatives of LoRA: what the contract's layers do not reach."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import omnilora as ol
from omnilora import proofs
from omnilora.contract import check_parameterization, shake
from omnilora.core.full import Full
from omnilora.errors import NotExpressible, NotMergeable, TargetError
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.fourier import FourierFT
from omnilora.parameterizations.hadamard import LoHa
from omnilora.parameterizations.kronecker import LoKr
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.masked import Masked
from omnilora.parameterizations.nola import NOLA
from omnilora.parameterizations.orthogonal import BOFT, OFT, cayley
from omnilora.parameterizations.randlora import RandLoRA
from omnilora.parameterizations.scaling import IA3, Shift

ADDITIVE = [LoHa(2, 5.0), LoKr(1, 3.0), FourierFT(9, 5.0), RandLoRA(2, 5.0), NOLA(3, 5.0, 0.0, 6, 7), Masked(LoRA(2, 3.0), std=0.1)]


@pytest.mark.parametrize("inner", ADDITIVE, ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("detach", [True, False])
def test_dora_over_additive_forms(inner, detach):
    assert check_parameterization(DoRA(inner, detach), frozenset({"mergeable", "rows"}), ["linear", "conv"]) > 20


@pytest.mark.parametrize("how", [OFT(4), IA3("input"), IA3("output"), LoKr(1, 3.0), LoHa(2, 5.0)], ids=lambda h: type(h).__name__)
def test_ungrouped_convolutions(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)).double(), torch.randn(2, 4, 6, 7).double()
    ol.adapt(model, ol.Method("x", how), "0")
    shake(model)
    assert torch.autograd.gradcheck(lambda *_: model(x), ol.trainable(model), fast_mode=True)
    y = model(x)
    ol.merge(model)
    torch.testing.assert_close(model(x), y)
    ol.unmerge(model)
    assert torch.equal(model(x), y)


def test_oft_of_a_convolution_rotates_the_patch():
    """y = W (Rᵀ patch) + b with the patches spelled out."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(2, 4, 7, 6)
    model = ol.adapt(nn.Sequential(conv), ol.method("oft", block=4), "0")
    shake(model)
    (s,) = ol.slots(model)
    R = torch.block_diag(*cayley(s.q, 4))
    patches = F.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1)).mT @ R
    want = (patches @ conv.weight.flatten(1).mT + conv.bias).mT
    torch.testing.assert_close(model(x).flatten(2), want)


def test_boft_on_a_linear_layer():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 6)).double(), torch.randn(3, 16).double()
    ol.adapt(model, ol.Method("x", BOFT(4, 3)))
    torch.testing.assert_close(model(x), model[0].weight.new_tensor(0) + F.linear(x, model[0].weight, model[0].bias))
    shake(model)
    assert torch.autograd.gradcheck(lambda *_: model(x), ol.trainable(model), fast_mode=True)
    y = model(x)
    ol.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    with pytest.raises(NotExpressible, match="levels"):
        ol.adapt(nn.Sequential(nn.Linear(6, 4)), ol.Method("x", BOFT(4, 3)))


def test_a_quantized_base_is_rotated_without_being_read(monkeypatch):
    from omnilora.core.site import Site
    from omnilora.stores.nf4_layer import quantize

    model = proofs.Stack(64, 32)
    quantize(model)
    ol.adapt(model, ol.method("oft", block=8))
    monkeypatch.setattr(Site, "read", lambda self: pytest.fail("W was dequantized as a matrix"))
    model(torch.randn(2, 64)).sum().backward()


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=40, **changes)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_ia3_rescales_keys_values_and_the_inner_activations():
    model = ol.adapt(llama(), ol.method("ia3"))
    sides = {s.site.name.split(".")[-1]: s.how.side for s in ol.slots(model)}
    assert sides == {"k_proj": "output", "v_proj": "output", "down_proj": "input"}
    assert sum(t.numel() for t in ol.trainable(model)) == 2 * (16 + 16 + 48)


def test_ssf_refuses_to_merge_a_shift_without_a_bias():
    model = ol.adapt(llama(), ol.method("ssf"))
    assert {s.site.role for s in ol.slots(model)} == {"attention", "mlp", "norm"}
    before = {k: v.clone() for k, v in ol.base_state_dict(model).items()}
    with pytest.raises(NotMergeable, match="no bias"):
        ol.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())


def test_bitfit_creates_biases_where_there_are_none(tmp_path):
    made = ol.method("bitfit", create=True)
    model = ol.adapt(llama(attention_bias=True), made)
    kinds = {s.site.name.split(".")[-2 if s.site.name.endswith("bias") else -1]: s.how for s in ol.slots(model)}
    assert {k for k, how in kinds.items() if isinstance(how, Full)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {k for k, how in kinds.items() if isinstance(how, Shift)} == {"gate_proj", "up_proj", "down_proj"}
    torch.manual_seed(0)
    base = llama()
    ids = torch.randint(0, 16, (2, 5))
    before = base(ids).logits
    ol.adapt(base, made)
    torch.testing.assert_close(base(ids).logits, before, rtol=1e-5, atol=1e-6)  # fused blocks round otherwise than the bare model
    shake(base)
    after = base(ids).logits
    assert not torch.allclose(after, before)
    ol.save(base, tmp_path / "a")
    torch.manual_seed(0)
    again = llama()
    ol.load(again, tmp_path / "a")
    assert torch.equal(again(ids).logits, after)
    with pytest.raises(NotMergeable, match="no bias"):
        ol.merge(base)


def test_bitfit_needs_a_bias_and_takes_every_one(tmp_path):
    with pytest.raises(TargetError, match="LlamaForCausalLM has no bias"):
        ol.adapt(llama(), ol.method("bitfit", create=False))
    with pytest.warns(UserWarning, match="each gets a new one"):
        bare = ol.adapt(llama(), ol.method("bitfit"))
    assert all(isinstance(s.how, Shift) for s in ol.slots(bare))
    model = ol.adapt(llama(attention_bias=True), ol.method("bitfit"))
    assert {s.site.name.split(".")[-2] for s in ol.slots(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    block = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 3, 16)
    ol.adapt(block, ol.method("bitfit"))
    names = {s.site.name for s in ol.slots(block)}
    assert names == {n for n, _ in block.named_parameters() if "bias" in n and "adapters" not in n}
    assert "0.self_attn.in_proj_bias" in names and len(names) == 6
    shake(block)
    y = block(x)
    ol.save(block, tmp_path / "a")
    ol.merge(block)
    torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-5)
    ol.unmerge(block)
    ol.detach(block)
    assert not torch.allclose(block(x), y)
    ol.load(block, tmp_path / "a")
    assert torch.equal(block(x), y)


def test_ln_tuning_needs_a_norm():
    with pytest.raises(TargetError, match="norm"):
        ol.adapt(proofs.Stack(4, 4), ol.method("ln_tuning"))
    model = ol.adapt(llama(), ol.method("ln_tuning"))
    assert len(ol.slots(model)) == 5 and sum(t.numel() for t in ol.trainable(model)) == 5 * 32


def test_a_stack_of_experts_is_refused_where_one_matrix_is_meant():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.w, x)

    for key in ("lokr", "randlora", "oft", "boft", "ia3", "ssf"):
        with pytest.raises(NotExpressible):
            ol.adapt(nn.Sequential(Experts()), ol.method(key), "0.w")
    x = torch.randn(2, 8)
    for key in ("loha", "nola", "hira"):
        model = nn.Sequential(Experts())
        y = model(x)
        ol.adapt(model, ol.method(key, r=2), "0.w")
        torch.testing.assert_close(model(x), y)
        shake(model)
        assert not torch.allclose(model(x), y)


def test_a_fresh_head_does_not_take_a_methods_own_unfreezing_away(tmp_path):
    """The trainer adds what the checkpoint lacks to what the method trains."""
    transformers = pytest.importorskip("transformers")
    from omnilora.core.method import method
    from omnilora.training.config import TrainConfig
    from omnilora.training.fit import _adapt
    from omnilora.training.models import Loaded

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=40, num_labels=3, pad_token_id=0)  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    parts = Loaded(model, None, labels=["a", "b", "c"], fresh=[r"re:score\.weight"])
    _adapt(parts, method("ln_tuning"), [], TrainConfig())
    assert {s.site.role for s in ol.slots(model)} == {"norm", "head"}
