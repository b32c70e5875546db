"""GGUF adapters, run by llama.cpp itself on a model of random weights: its logits are ours."""

from __future__ import annotations

import struct

import pytest
import torch

import omnilora as ol
from omnilora.core.method import Method
from omnilora.errors import FileRefused, NotExpressible, StateMismatch
from omnilora.io import gguf as ours
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
IDS = [1, 5, 9, 33, 21, 7, 60]
L = LoRA(4, 6.0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj", "embed_tokens", "lm_head"]


def base(kind):
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=96, max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    configs = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
               "opt": transformers.GPTNeoXConfig}  # fmt: skip
    config = configs[kind](**{k: v for k, v in small.items() if kind != "opt" or k != "num_key_value_heads"},
                           **({"head_dim": 16} if kind == "qwen3" else {}))  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.dim() == 1))
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def model_file(model, path):
    c, architecture, reordered = ours._architecture(model)
    table = ours._names(c, architecture)
    w = gguf.GGUFWriter(path, architecture)
    w.add_type("model")
    head = c.hidden_size // c.num_attention_heads
    for add, value in [(w.add_context_length, 64), (w.add_embedding_length, c.hidden_size), (w.add_block_count, c.num_hidden_layers),
                       (w.add_feed_forward_length, c.intermediate_size), (w.add_head_count, c.num_attention_heads),
                       (w.add_head_count_kv, c.num_key_value_heads), (w.add_layer_norm_rms_eps, c.rms_norm_eps),
                       (w.add_rope_freq_base, c.rope_parameters["rope_theta"]), (w.add_rope_dimension_count, head),
                       (w.add_key_length, head), (w.add_value_length, head), (w.add_vocab_size, c.vocab_size), (w.add_file_type, 0),
                       (w.add_tokenizer_model, "llama"), (w.add_bos_token_id, 1), (w.add_eos_token_id, 2),
                       (w.add_token_list, [b"<unk>", b"<s>", b"</s>"] + [f"t{i}".encode() for i in range(3, c.vocab_size)]),
                       (w.add_token_scores, [0.0] * c.vocab_size), (w.add_token_types, [2, 3, 3] + [1] * (c.vocab_size - 3))]:  # fmt: skip
        add(value)
    for key, value in model.state_dict().items():
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        heads = ours._heads(name.rpartition(".")[0], c)
        w.add_tensor(name, (ours._interleaved(value, heads) if reordered and heads else value).contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return str(path)


def theirs(path, adapter=None):
    llama = pytest.importorskip("llama_cpp")
    model = llama.Llama(path, n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False, lora_path=adapter,
                        type_k=0, type_v=0)  # fmt: skip
    model.eval(IDS)
    return torch.tensor(model.scores[: len(IDS)])


def gap(a, b):
    return float((a - b).norm() / b.norm())


def adapted(kind, how=L, **options):
    model = base(kind)
    ol.adapt(model, Method("own", how), **options)
    with torch.no_grad():
        for i, p in enumerate(p for s in ol.slots(model) for _, p in s.tensors()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_computes_what_we_do(kind, tmp_path):
    plain = base(kind)
    file = model_file(plain, tmp_path / "base.gguf")
    assert gap(theirs(file), logits(plain)) < 1e-5
    model = adapted(kind, targets=TARGETS, overrides={"v_proj": {"r": 3, "alpha": 9.0}})
    y = logits(model)
    assert gap(y, logits(plain)) > 0.5
    report = ol.export(model, tmp_path / "adapter.gguf", "llama.cpp")
    assert report["worst"] == 0.0
    assert gap(theirs(file, report["path"]), y) < 1e-5
    half = ol.export(model, tmp_path / "half.gguf", "llama.cpp", save_dtype="fp16")
    assert 0 < half["worst"] < 1e-3 and 1e-6 < gap(theirs(file, half["path"]), y) < 1e-2
    again = base(kind)
    ol.load(again, tmp_path / "adapter.gguf")
    assert gap(logits(again), y) < 1e-5
    assert ol.export(again, tmp_path / "b.gguf", "gguf")["for"] == "llama.cpp"


def test_the_order_of_rows_matters(tmp_path, monkeypatch):
    """Without the reordering of q and k llama.cpp computes something else: the test above can fail."""
    file = model_file(base("llama"), tmp_path / "base.gguf")
    model = adapted("llama", targets=["q_proj", "k_proj"])
    monkeypatch.setattr(ours, "_interleaved", lambda B, heads: B)
    ol.export(model, tmp_path / "wrong.gguf", "llama.cpp")
    assert gap(theirs(file, str(tmp_path / "wrong.gguf")), logits(model)) > 1e-2


def test_one_alpha_where_all_scales_agree(tmp_path):
    model = adapted("llama", targets=["q_proj", "down_proj"])
    architecture, alpha, tensors = ours.tensors_of(ol.state(model), model)
    assert (architecture, alpha) == ("llama", 6.0)
    slot = next(s for s in ol.slots(model) if s.site.name.endswith("0.mlp.down_proj"))
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], slot.B)


def test_lowered(tmp_path):
    model = adapted("llama", DoRA(LoRA(2, 4.0)), targets=["q_proj"])
    with pytest.raises(NotExpressible, match=r"q_proj.*DoRA"):
        ol.export(model, tmp_path / "a.gguf", "llama.cpp")
    report = ol.export(model, tmp_path / "b.gguf", "llama.cpp", rank=64)
    again = base("llama")
    ol.load(again, report["path"])
    assert gap(logits(again), logits(model)) < 1e-4


def test_refused(tmp_path):
    with pytest.raises(NotExpressible, match="gpt_neox"):
        ol.export(adapted("opt", targets=["dense"]), tmp_path / "a.gguf", "llama.cpp")
    state = ol.state(adapted("llama", targets=["q_proj"]))
    with pytest.raises(NotExpressible, match="Give the model"):
        ol.export(state, tmp_path / "a.gguf", "llama.cpp")
    ol.export(adapted("qwen2", targets=["q_proj"]), tmp_path / "q.gguf", "llama.cpp")
    with pytest.raises(StateMismatch, match="qwen2"):
        ol.load(base("llama"), tmp_path / "q.gguf")
    data = (tmp_path / "q.gguf").read_bytes()
    for i, bad in enumerate([b"", b"GGUF", data[:100], b"GGUF" + struct.pack("<I", 3) + b"\xff" * 60, data[: len(data) // 2]]):
        path = tmp_path / f"bad{i}.gguf"
        path.write_bytes(bad)
        with pytest.raises(FileRefused):
            ol.load_file(path)
    model_file(base("llama"), tmp_path / "model.gguf")
    with pytest.raises(FileRefused, match="no adapter"):
        ol.load_file(tmp_path / "model.gguf")
