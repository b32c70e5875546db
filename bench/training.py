"""Training steps as ratios to the frozen model of the library it comes from, with what each step keeps.

    python bench/training.py [--only fp32,bf16,nf4,wide,smollm,sites,methods] [--rounds 7] [--quick] [--out bench/results/training.json]

A step is forward, loss, and backward to the input's embeddings. "frozen" is transformers' own model with its own loss. PEFT runs
as users run it, and with every layer compiled and our chunked loss. Ours runs with the loss that ``ol.fit`` takes.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from common import LINEAR, interleave, kept_bytes, llama, machine, ratios, show, smollm, without_cache, write
from torch import Tensor, nn

import omnilora as ol
from omnilora.training.frugal import head_of

Variant = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def whole_loss(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    def loss(model: Any) -> Tensor:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        return model(inputs_embeds=x, labels=ids).loss

    return loss


def lean_loss(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    """The chunked loss that makes no logits."""
    labels = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), 1)

    def loss(model: Any) -> Tensor:
        head = head_of(getattr(model, "base_model", model).model if isinstance(model, peft.PeftModel) else model)
        assert not isinstance(head, str), head
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        with head.caught() as seen:
            model(inputs_embeds=x, logits_to_keep=torch.empty(0, dtype=torch.long))
        return head.loss(seen[0], labels) / (labels != -100).sum()

    return loss


def theirs(base: nn.Module, r: int, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR, **options)
    return peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).train()


def compiled(model: nn.Module) -> nn.Module:
    for layer in model.base_model.model.model.layers:  # type: ignore[union-attr]
        layer.compile()
    return model


def ours(base: nn.Module, key: str, **hyper: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ol.adapt(copy.deepcopy(base), ol.method(key, **hyper)).train()


def measure(title: str, variants: dict[str, Variant], rounds: int) -> dict[str, Any]:
    def step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        loss(model).backward()

    def clear() -> None:
        for model, _ in variants.values():
            model.zero_grad()

    table = ratios(interleave({n: (lambda v=v: step(*v)) for n, v in variants.items()}, rounds, clear), "frozen")
    for name, (model, loss) in variants.items():
        table[name]["kept MiB"] = kept_bytes(model, lambda model=model, loss=loss: loss(model)) / 2**20
    show(title, table)
    return table


def frozen(base: nn.Module, ids: Tensor) -> dict[str, Variant]:
    return {"frozen": (copy.deepcopy(base).requires_grad_(False).train(), whole_loss(ids))}


def lora(base: nn.Module, ids: Tensor, r: int, rounds: int, title: str, with_compiled: bool = True) -> dict[str, Any]:
    whole, lean = whole_loss(ids), lean_loss(ids)
    variants = frozen(base, ids) | {"peft lora": (theirs(base, r), whole), "omnilora lora": (ours(base, "lora", r=r), lean)}
    variants["omnilora lora, their loss"] = (variants["omnilora lora"][0], whole)
    if with_compiled:
        variants["peft lora, compiled, our loss"] = (compiled(theirs(base, r)), lean)
    return measure(title, variants, rounds)


def methods(base: nn.Module, ids: Tensor, rounds: int, title: str) -> dict[str, Any]:
    whole, lean = whole_loss(ids), lean_loss(ids)
    vera = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=64, target_modules=LINEAR)).train()
    variants = frozen(base, ids) | {
        "omnilora lora": (ours(base, "lora", r=16), lean),
        "peft lora + dropout": (theirs(base, 16, lora_dropout=0.05), whole),
        "omnilora lora + dropout": (ours(base, "lora", r=16, dropout=0.05), lean),
        "peft dora": (theirs(base, 16, use_dora=True), whole), "omnilora dora": (ours(base, "dora", r=16), lean),
        "peft vera": (vera, whole), "omnilora vera": (ours(base, "vera", r=64), lean),
        "omnilora tensor train": (ours(base, "loretta_rep", r=16), lean),
        "omnilora 4 experts": (ours(base, "molora", experts=4, r=8, top_k=2), lean),
    }  # fmt: skip
    return measure(title, variants, rounds)


def four_bits(base: nn.Module, ids: Tensor, rounds: int) -> dict[str, Any]:
    """QLoRA: NF4 with double quantization, bitsandbytes' layers under PEFT, ours under ours."""
    whole, lean = whole_loss(ids), lean_loss(ids)
    other = copy.deepcopy(base)
    for name, layer in [(n, m) for n, m in other.named_modules() if n.rpartition(".")[2] in LINEAR]:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, compute_dtype=layer.weight.dtype, quant_type="nf4",
                                 compress_statistics=True)  # fmt: skip
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        other.set_submodule(name, made.to("cpu"))
    variants = frozen(base, ids) | {"peft qlora": (theirs(other, 16), whole), "omnilora qlora": (ours(base, "qlora", r=16), lean)}
    return measure("Llama 30 M, NF4, r 16, bf16", variants, rounds)


def sites(rounds: int, quick: bool) -> dict[str, Any]:
    """Architectures without a block plan: an encoder and a convolutional net."""
    torch.manual_seed(0)
    d, layers = (64, 2) if quick else (384, 6)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=2000, hidden_size=d, num_hidden_layers=layers, intermediate_size=4 * d,
                                                          num_attention_heads=d // 16))  # fmt: skip
    ids = torch.randint(0, 2000, (4, 32 if quick else 128))

    def encoder(model: Any) -> Tensor:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        return model(inputs_embeds=x).last_hidden_state.square().mean()

    linear = ["query", "key", "value", "dense"]
    out = {"encoder": _against_peft("encoder, 6 layers of width 384", bert, encoder, linear, rounds)}
    width = 16 if quick else 256
    middle = [m for _ in range(6) for m in (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    for size in (16, 32):
        images = torch.randn(4, 3, size, size)

        def conv(model: nn.Module, images: Tensor = images) -> Tensor:
            return model(images.clone().requires_grad_()).square().mean()

        title = f"conv net of width {width}, 4 images of {size} × {size}"
        out[f"conv net {size} × {size}"] = _against_peft(title, net, conv, names, rounds)
    return out


def _against_peft(title: str, base: nn.Module, loss: Callable[[Any], Tensor], targets: list[str], rounds: int) -> dict[str, Any]:
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets)
    patterns = targets if isinstance(base, nn.Sequential) else None
    mine = ol.adapt(copy.deepcopy(base), ol.method("lora", r=16), patterns, exclude=[] if patterns else ["pooler.dense"])
    other = peft.get_peft_model(copy.deepcopy(base), config).train()
    variants: dict[str, Variant] = {"frozen": (copy.deepcopy(base).requires_grad_(False).train(), loss), "peft lora": (other, loss),
                                    "omnilora lora": (mine.train(), loss)}  # fmt: skip
    return measure(title, variants, rounds)


def run(only: set[str], rounds: int, quick: bool) -> dict[str, Any]:
    shape = (2, 32) if quick else (4, 128)
    ids = torch.randint(0, 900, shape)
    out: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        if dtype in only:
            out[f"llama 30M {dtype}"] = lora(without_cache(llama(quick, dtype)), ids, 16, rounds, f"Llama 30 M, r 16, {dtype}", not quick)
        if "methods" in only and (dtype in only or not only & {"fp32", "bf16"}):
            out[f"methods {dtype}"] = methods(without_cache(llama(quick, dtype)), ids, rounds, f"Llama 30 M, methods, {dtype}")
    if "nf4" in only:
        out["nf4 bf16"] = four_bits(without_cache(llama(quick, "bf16")), ids, rounds)
    if "wide" in only:
        for dtype in ("fp32", "bf16"):
            base = without_cache(llama(quick, dtype, width=1024))
            out[f"llama width 1024 {dtype}"] = lora(base, ids, 16, rounds, f"Llama, 8 layers of width 1024, r 16, {dtype}", False)
    if "smollm" in only:
        longer = torch.randint(0, 900, (2, 32) if quick else (4, 256))
        out["smollm 135M bf16"] = lora(without_cache(smollm(quick)), longer, 8, rounds, "SmolLM2-135M, r 8, bf16", not quick)
    if "sites" in only:
        out |= sites(rounds, quick)
    return out


PARTS = ("fp32", "bf16", "nf4", "wide", "smollm", "sites", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small models, for a look")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = run(set(args.only.split(",")), args.rounds, args.quick)
    write(args.out, {"machine": machine(), "training": found})


if __name__ == "__main__":
    main()
