"""What other libraries say while a model is loaded or saved and nobody can use: bars off a terminal, notes on imports."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

IMPORTS = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")  # loggers
NOTES = ("Failed to load", "Skipping import of cpp extensions", "Detected no triton", "register_constant() on Enum")


def _useful(record: logging.LogRecord) -> bool:
    return not any(note in record.getMessage() for note in NOTES)


def quiet_imports() -> None:
    """Drop, from now on, what torchao and bitsandbytes say of extensions that are not here and nobody asked for."""
    for name in IMPORTS:
        logging.getLogger(name).addFilter(_useful)  # a filter is added once


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No report on a head that is expected to be new, no bars where nobody sees them move."""
    quiet_imports()
    said = transformers.utils.logging
    level, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            said.disable_progress_bar()
            home = import_module("transformers.modeling_gguf_pytorch_utils")
            if hasattr(home, "tqdm"):
                stack.enter_context(mock.patch.object(home, "tqdm", partial(home.tqdm, disable=True)))
        try:
            yield
        finally:
            said.set_verbosity(level)
            if bars:
                said.enable_progress_bar()
