"""GGUF adapters for llama.cpp: LoRA of the layers that the architecture's tensor map names.

``blk.0.attn_q.weight.lora_a`` (r, in) and ``.lora_b`` (out, r); the file has one α and llama.cpp scales every pair by α/r, so
other scales are in B. Of Llama's family the rows of q and k are stored in another order than transformers', half by half of
each head: B's rows are reordered, and back on reading. An embedding's ``lora_a`` is stored (vocabulary, r).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnilora.core.site import called_site
from omnilora.core.state import AdapterState, SiteState
from omnilora.errors import BadValue, FileRefused, NotExpressible, StateMismatch, need
from omnilora.io.lycoris import plain
from omnilora.io.names import GGUF, NAMES, is_raw
from omnilora.parameterizations.lora import LoRA

# transformers' model_type → (llama.cpp's architecture, whether q and k are reordered)
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False), "phi3": ("phi3", False),
    "gpt2": ("gpt2", False), "olmo2": ("olmo2", False), "granite": ("granite", True),
}  # fmt: skip
MAGIC = b"GGUF"


def _architecture(model: nn.Module | None) -> tuple[Any, str, bool]:
    """(the model's configuration, architecture, whether q and k are reordered)."""
    config: Any = None if model is None else vars(model).get("config")
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise NotExpressible("A GGUF adapter needs the architecture: heads and names of tensors follow from it.",
                             "Give the model, of transformers.")  # fmt: skip
    if kind not in ARCHITECTURES:
        raise NotExpressible(f"llama.cpp's layout of {kind!r} is not known here.", f"Known: {', '.join(sorted(ARCHITECTURES))}.")
    return config, *ARCHITECTURES[kind]


def _names(config: Any, architecture: str) -> Any:
    library: Any = need("gguf", "train")
    arch = next(k for k, v in library.MODEL_ARCH_NAMES.items() if v == architecture)
    return library.get_tensor_name_map(arch, int(config.num_hidden_layers))


def _heads(name: str, config: Any) -> int:
    """Heads whose rows are reordered; 0 for other layers."""
    if name.endswith("attn_q"):
        return int(config.num_attention_heads)
    if name.endswith("attn_k"):
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 0


def _interleaved(B: Tensor, heads: int) -> Tensor:
    """Rows of each head (first half, second half) → pairs."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halved(B: Tensor, heads: int) -> Tensor:
    return B.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tensors_of(state: AdapterState, model: nn.Module | None) -> tuple[str, float, dict[str, Tensor]]:
    """(architecture, α, tensors in fp32). Raises NotExpressible with the site and the reason."""
    config, architecture, reordered = _architecture(model)
    if state.carried:
        raise NotExpressible(f"The adapter carries the weights of {len(state.carried)} base layers.", "Use omnilora's own format.")
    table = None if is_raw(state) and state.extra[NAMES] == GGUF else _names(config, architecture)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    thin: dict[str, tuple[Tensor, Tensor, float]] = {}
    for path, s in state.sites.items():
        ba = plain(path, s, state) if s.kind in ("linear", "embedding") else None
        if ba is None:
            what = f"slice of a layer under {type(s.how).__name__}" if s.region else f"{type(s.how).__name__} on a {s.kind}"
            raise NotExpressible(f"{path}: llama.cpp takes LoRA of linear layers and of the embedding, no {what}.",
                                 "Give rank= to lower it, or leave it out.")  # fmt: skip
        name = path if table is None else table.get_name(path)
        if name is None:
            raise NotExpressible(f"{path}: llama.cpp's {architecture} has no tensor for it.", "Leave it out.")
        if tied and name == "output":
            raise NotExpressible(f"{path}: llama.cpp has one tensor for the tied embedding and head.", "Leave the head out.")
        pad = s.marks.get("stored", {}).get("pad")
        if pad is not None and s.kind == "embedding" and ba[1][:, pad].any():
            raise NotExpressible(f"{path}: A is not zero at the padding id {pad}, where llama.cpp would apply it.")
        B, A, scale = ba
        if reordered and (heads := _heads(name, config)):
            B = _interleaved(B, heads)
        thin[name] = (B, A, scale)
    wanted = {n: scale * A.shape[0] for n, (_, A, scale) in thin.items()}
    alphas = set(wanted.values())
    alpha = float(np.float32(next(iter(alphas)))) if len(alphas) == 1 and 0.0 not in alphas else 1.0
    out: dict[str, Tensor] = {}
    for name, (B, A, _) in thin.items():
        factor = wanted[name] / alpha
        A = A.mT if name == "token_embd" else A
        out[f"{name}.weight.lora_a"] = A.float().contiguous()
        out[f"{name}.weight.lora_b"] = (B.float() if factor == 1.0 else B.float() * factor).contiguous()
    return architecture, alpha, out


def written(state: AdapterState, model: nn.Module | None, dtype: torch.dtype | None = None) -> bytes:
    """The file's bytes, in fp32 or fp16."""
    if dtype not in (None, torch.float16):
        raise BadValue("A GGUF adapter is written in fp32 or fp16.", "Give save_dtype='fp16', or leave it out.")
    architecture, alpha, tensors = tensors_of(state, model)
    library: Any = need("gguf", "train")
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "adapter.gguf")
        writer = library.GGUFWriter(path, architecture)
        writer.add_type(library.GGUFType.ADAPTER)
        writer.add_string(library.Keys.Adapter.TYPE, "lora")
        writer.add_float32(library.Keys.Adapter.LORA_ALPHA, alpha)
        for name in sorted(tensors):
            writer.add_tensor(name, tensors[name].to(dtype or torch.float32).detach().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(path).read_bytes()


def read(path: Path, quota: int) -> AdapterState:
    """A GGUF adapter under llama.cpp's names. Raises FileRefused for other and for damaged files."""
    library: Any = need("gguf", "train")
    size = path.stat().st_size
    if size > quota:
        raise FileRefused(f"{path.name} has {size} bytes.", f"The quota is {quota}.")
    with open(path, "rb") as f:
        if f.read(4) != MAGIC:
            raise FileRefused(f"{path.name} is no GGUF file.")
    try:
        reader = library.GGUFReader(str(path))
        fields = {k: reader.get_field(k) for k in ("general.type", "adapter.type", "adapter.lora.alpha", "general.architecture")}
        said = {k: None if f is None else f.contents() for k, f in fields.items()}
        tensors = {t.name: torch.from_numpy(np.array(library.dequantize(t.data, t.tensor_type), dtype=np.float32))
                   for t in reader.tensors} if said["general.type"] == "adapter" else {}  # fmt: skip
        odd = reader.get_field("adapter.alora.invocation_tokens") is not None
    except Exception as error:  # the reader raises whatever the bytes provoke
        raise FileRefused(f"{path.name} cannot be read: {type(error).__name__} {str(error)[:120]}.",
                          "It is damaged, or no GGUF file.") from error  # fmt: skip
    if said["general.type"] != "adapter" or said["adapter.type"] != "lora":
        raise FileRefused(f"{path.name} is a GGUF {said['general.type'] or 'model'}, no adapter.", "Give it as a model.")
    if odd:
        raise NotExpressible(f"{path.name} acts from an invocation on (aLoRA): that map cannot be read.")
    return _state(path, tensors, said)


def _state(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> AdapterState:
    alpha = said["adapter.lora.alpha"]
    sites: dict[str, SiteState] = {}
    for key in sorted(tensors):
        name, sign, leaf = key.rpartition(".weight.lora_")
        if not sign or leaf not in ("a", "b") or f"{name}.weight.lora_{'b' if leaf == 'a' else 'a'}" not in tensors:
            raise FileRefused(f"{path.name}: unexpected tensor {key!r}.", "It is no pair of LoRA.")
        if leaf == "b":
            continue
        A, B = tensors[key], tensors[f"{name}.weight.lora_b"]
        embedded = name == "token_embd"
        A = A.mT if embedded else A
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise NotExpressible(f"{path.name}: {name} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)}.",
                                 "Only pairs of matrices are read.")  # fmt: skip
        r = A.shape[0]
        value = float(alpha) if alpha else float(r)
        sites[name] = SiteState(LoRA(r, value), "embedding" if embedded else "linear", value / r,
                                {"A": A.contiguous(), "B": B.contiguous()}, {"A": "input", "B": "output"},
                                shape=(B.shape[0], A.shape[1]))  # fmt: skip
    extra = {NAMES: GGUF, "architecture": str(said["general.architecture"])}
    return AdapterState("lora", {}, sites, {}, {}, extra)


def placed(state: AdapterState, model: nn.Module) -> AdapterState:
    """The state under the model's names, rows of q and k in the model's order."""
    config, architecture, reordered = _architecture(model)
    if state.extra.get("architecture") != architecture:
        raise StateMismatch(f"The adapter is for llama.cpp's {state.extra.get('architecture')!r}, the model is {architecture!r}.",
                            "Is this the right base model?")  # fmt: skip
    table, layers = _names(config, architecture), dict(model.named_modules())
    paths = {table.get_name(p): p for p in layers if ".adapters" not in f".{p}" and table.get_name(p) is not None}
    sites = {}
    for name, s in state.sites.items():
        path = paths.get(name)
        site = None if path is None else called_site(path, layers[path])
        if path is None or site is None or (site.fan_out, site.fan_in) != s.shape:
            raise StateMismatch(f"The model has no layer for {name!r} of {s.shape}.", "Is this the right base model?")
        tensors = dict(s.tensors)
        if reordered and (heads := _heads(name, config)):
            tensors["B"] = _halved(tensors["B"], heads).contiguous()
        sites[path] = replace(s, kind=site.kind, tensors=tensors)
    return replace(state, sites=sites, extra={k: v for k, v in state.extra.items() if k not in (NAMES, "architecture")})
