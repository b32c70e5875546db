"""omnilora: every low-rank adaptation method, on any layer and any base, under one interface.

    import omnilora as ol

    ol.adapt(model, ol.method("dora", r=16), targets=["attention", "mlp"])
    ol.fit(model, "train.jsonl", tokenizer=tokenizer)
    ol.save(model, "adapter")
"""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
from typing import Any

_HOME = {
    "adapt": "core.attach", "activate": "core.attach", "active": "core.attach", "adapters": "core.attach",
    "base_state_dict": "core.attach", "checkpoint_context": "core.attach", "context": "core.attach",
    "detach": "core.attach", "disabled": "core.attach", "slots": "core.attach",
    "merge": "core.merge", "unmerge": "core.merge", "merge_and_unload": "core.merge", "MergeReport": "core.merge",
    "state": "core.state", "load_state": "core.state", "AdapterState": "core.state", "Combine": "core.state",
    "save": "core.files", "save_state": "core.files", "load": "core.files", "load_file": "core.files",
    "param_groups": "core.run", "start": "core.run", "trainable": "core.run", "Run": "core.run",
    "method": "core.method", "cards": "core.method", "Method": "core.method", "Card": "core.method",
    "Claim": "core.method", "add_entry": "core.method",
    "Targets": "core.targets", "Rule": "core.rule", "Parameterization": "core.parameterization",
    "check_parameterization": "contract", "check_rule": "contract", "check_combine": "contract",
    "check_method": "contract",
    "prepare": "core.method", "combine": "core.method",
    "train": "training.fit", "TrainConfig": "training.config", "evaluate": "training.evaluate",
    "generate": "training.evaluate", "stream": "training.evaluate", "load_trained": "training.models",
    "explain": "explanation", "fit": "training.fit", "gradient_checkpointing": "training.recompute",
    "export": "io.export", "convert": "io.export", "push": "io.hub", "pull": "io.hub", "quantize": "stores.nf4_layer",
    "compare": "comparison.runner", "integrate": "integrations.trainer", "Reference": "integrations.reference",
}  # fmt: skip

__all__ = [*sorted(_HOME), "methods", "errors"]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("omnilora.methods")
    if name == "errors":
        return importlib.import_module("omnilora.errors")
    if name in _HOME:
        return getattr(importlib.import_module(f"omnilora.{_HOME[name]}"), name)
    raise AttributeError(f"module 'omnilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
