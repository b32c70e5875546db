"""A merged model in a folder of its own: measured, saved beside the target, then moved there in one step."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnilora.core.merge import merge, merge_and_unload, unmerge
from omnilora.errors import BadValue, NotExpressible, need
from omnilora.io.places import check_folder
from omnilora.training.quiet import quiet


def check_empty(output: Path) -> None:
    """Whether a model can be saved in ``output``. Raises :class:`BadValue`."""
    check_folder(output)
    if output.is_dir() and any(output.iterdir()):
        raise BadValue(f"{output} exists and is not empty.", "Choose another --output.")


def merged_folder(model: Any, tokenizer: Any, output: Path, probe: str, bound: float | None,
                  keep_quantized: bool) -> dict[str, Any]:  # fmt: skip
    """Merge the active adapter, save the plain model and its tokenizer; the report with "output" and "bytes".

    Raises: MergeRefused, NotMergeable; BadValue where ``output`` holds something already.
    """
    check_empty(output)
    batch = tokenizer(probe, return_tensors="pt").to(next(model.parameters()).device)

    def outputs(m: Any) -> Tensor:
        return m(**batch)[0].float()

    report = merge(model, keep="ram", probe=outputs, bound=bound, requantize=keep_quantized)
    unmerge(model)
    merge_and_unload(model, bound=float("inf"), requantize=keep_quantized)
    _note_quantizer(model)
    fresh = output.with_name(f".{output.name}.{uuid.uuid4().hex[:12]}")
    try:
        fresh.mkdir(parents=True)
        with quiet(need("transformers", "train")):
            model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if output.exists():
            output.rmdir()
        os.rename(fresh, output)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    held = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    return {**report.as_dict(), "output": str(output), "bytes": held}


def _note_quantizer(model: Any) -> None:
    """Say in the model's configuration how its weights are held, so that transformers loads what was saved."""
    from omnilora.stores.coded import make_dense
    from omnilora.stores.nf4_layer import FourBitLinear

    make_dense(model)  # no file format of transformers holds a codec's bytes
    packed = [m for m in model.modules() if isinstance(m, FourBitLinear)]
    if not packed:
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        model.hf_quantizer = None
        return
    first = packed[0].packed
    if first.blocksize != 64:
        raise NotExpressible(f"Weights are held in blocks of {first.blocksize}; bitsandbytes' files have 64.",
                             "Merge without --keep-quantized.")  # fmt: skip
    transformers = need("transformers", "train")
    loose = sorted({n for n, m in model.named_modules() if type(m) is torch.nn.Linear})
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=first.quant_type,
        bnb_4bit_use_double_quant=first.nested_absmax is not None,
        bnb_4bit_compute_dtype=packed[0].compute_dtype, llm_int8_skip_modules=loose or None)  # fmt: skip
