"""What the fields of PEFT's adapter_config.json mean for the map of a saved adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from omnilora.errors import NotExpressible, UnknownName, nearest
from omnilora.io.peft_starts import from_the_base

# "read": used by the reader; "hint": training or matching, no part of a saved map;
# "note": about the file; "refused": another map unless neutral. A field that is not listed must be neutral.
FIELDS: dict[str, str] = {
    **dict.fromkeys(("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
                     "alpha_pattern", "lora_bias", "bias", "modules_to_save", "target_parameters", "target_modules",
                     "trainable_token_indices", "init_lora_weights", "init_r", "projection_prng_key",
                     "save_projection", "vera_dropout", "d_initial", "alpha", "feedforward_modules", "oft_block_size",
                     "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "block_share", "randlora_alpha", "n_frequency",
                     "n_frequency_pattern", "scaling", "random_loc_seed", "boft_block_size", "boft_n_butterfly_factor",
                     "token_indices", "decompose_factor", "decompose_both", "use_effective_conv2d"), "read"),
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_weights",
                     "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
                     "lora_ga_config", "qalora_group_size", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
                     "orth_reg_weight", "total_step", "rank_dropout", "module_dropout", "rank_dropout_scale", "boft_dropout",
                     "randlora_dropout", "hira_dropout", "init_ia3_weights", "eps", "boft_block_num", "sparse",
                     "very_sparse"), "hint"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping",
                     "inference_mode", "runtime_config", "merge_weights", "target_rank", "adapter_name"), "note"),
    **dict.fromkeys(("use_qalora", "alora_invocation_tokens", "layer_replication", "velora_config",
                     "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying", "enable_lora"),
                    "refused"),
}  # fmt: skip
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def check_fields(config: Mapping[str, Any], with_base: bool = False) -> None:
    """Raises UnknownName or NotExpressible for a field that may change the map in a way that is not read; warns of an unknown
    number or word, which belongs to a switch that is off. ``with_base``: the base is there, from which a start can be computed
    again."""
    for key, value in config.items():
        use = FIELDS.get(key)
        neutral = value is None or value is False or value == {} or value == []
        if use in ("read", "hint", "note") or neutral:
            continue
        if use is None and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            warnings.warn(f"adapter_config.json has the unknown field {key!r} = {str(value)[:60]!r}; it is not read.",
                          stacklevel=2)  # fmt: skip
            continue
        if use is None:
            raise UnknownName(f"adapter_config.json has the unknown field {key!r} = {str(value)[:60]!r}, which may "
                              "change the map.",
                              f"{nearest(key, FIELDS)} Remove it from the file if it does not.")  # fmt: skip
        raise NotExpressible(f"adapter_config.json sets {key!r}: that map cannot be read.")
    if config.get("peft_type") == "LOKR" and "exclude_modules" not in config and config.get("alpha") != config.get("r"):
        warnings.warn("adapter_config.json is of PEFT before 0.14, which trained LoKr without its scale α/r; it is read as present "
                      "PEFT reads it, with the scale.", stacklevel=2)  # fmt: skip
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE and from_the_base(start) and not with_base:
        raise NotExpressible(f"init_lora_weights = {start!r} took a part out of the base, which the base gives again.",
                             "Read it with ol.load(model, path), or give the model.")  # fmt: skip
    if start not in KEEPS_BASE and not from_the_base(start):
        raise NotExpressible(f"init_lora_weights = {start!r} changed the base weights that this adapter sits on.",
                             "Save it with path_initial_model_for_weight_conversion first.")  # fmt: skip
