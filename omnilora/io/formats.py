"""Every format, once: how a path is recognised, how it is read, what a target refuses and why, and what is written.

``ol.load``, ``omnilora convert``, ``omnilora export`` and ``omnilora explain`` ask this table and nothing else.
"""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as encode
from torch import Tensor, nn

from omnilora.core.files import read_json, read_tensors, write_folder
from omnilora.core.full import Full
from omnilora.core.site import called_site
from omnilora.core.state import AdapterState, site_at
from omnilora.errors import BadValue, FileRefused, NotExpressible, OmniloraError, UnknownName, nearest
from omnilora.io import names, single
from omnilora.io.lycoris import plain
from omnilora.io.peft import from_peft, to_peft
from omnilora.io.peft_names import PREFIX, family_of
from omnilora.io.peft_values import targeted
from omnilora.io.places import check_file, check_folder
from omnilora.io.vllm import folded
from omnilora.parameterizations.lora import LoRA

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """What a writer may ask besides the state: the model (also without weights), the part of a pipeline, 16 bits."""

    model: nn.Module | None = None
    part: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Format:
    """``files``: the bytes of each file; raises NotExpressible with site and reason. ``trial``: the same check without bytes.
    ``single``: its one file may be named by the user."""

    name: str
    says: str
    files: Callable[[AdapterState, Target], Files]
    trial: Callable[[AdapterState, Target], Any]
    single: bool = False
    own_names: bool = True  # writes the model's names, so that a state under a file's names must be placed first


# -- writing -----------------------------------------------------------------------------------------------------------


def _ordered(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {k: rounded(tensors[k], dtype).detach().cpu().contiguous() for k in sorted(tensors)}


def rounded(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Vectors and matrices in ``dtype``; α and counts as they are."""
    return t if dtype is None or not t.is_floating_point() or t.dim() == 0 else t.to(dtype)


def thinned(state: AdapterState) -> AdapterState:
    """Products of two thin matrices that PEFT has no type for, or one beside others of another type, as LoRA: the same map."""
    families = {n: family_of(s.how) for n, s in state.sites.items()}
    mixed = len({f for f in families.values() if f not in (None, "own")}) > 1
    sites = {}
    for name, s in state.sites.items():
        odd = families[name] is None or (mixed and families[name] not in ("own", "LORA"))
        ba = plain(name, s, state) if odd else None
        if ba is not None:
            r = ba[1].shape[0]
            s = replace(s, how=LoRA(r, float(r)), scale=1.0, tensors={"A": ba[1], "B": ba[0] * ba[2]}, shared={},
                        roles={"A": "input", "B": "output"})  # fmt: skip
        sites[name] = s
    used = {key for s in sites.values() for key in s.shared.values()}
    return replace(state, sites=sites, shared={k: t for k, t in state.shared.items() if k in used})


def _peft_files(state: AdapterState, to: Target) -> Files:
    config, tensors = to_peft(thinned(state))
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return {"adapter_config.json": text.encode(), "adapter_model.safetensors": encode(_ordered(tensors, to.dtype), {"format": "pt"})}


def _native_files(state: AdapterState, to: Target) -> Files:
    from omnilora.core.files import files_of

    return files_of(state)


def differences(state: AdapterState, model: nn.Module | None) -> AdapterState:
    """Own copies of whole tensors as what they add to the base, where the base's weights are there."""
    if model is None:
        return state
    layers, sites = dict(model.named_modules()), {}
    for name, s in state.sites.items():
        if type(s.how) is Full and not s.how.delta_form and s.how.rows is None and s.region is None:
            site = site_at(model, name, s, layers)
            if not site.store.parameter.is_meta:
                own = s.tensor("W", state)
                s = replace(s, how=Full(delta_form=True), tensors={"W": own - site.read().detach().to(own)}, shared={})
        sites[name] = s
    return replace(state, sites=sites)


def _one_file(name: str, tensors: Mapping[str, Tensor], state: AdapterState, to: Target) -> Files:
    kept = {k: v for k, v in state.extra.get("metadata", {}).items() if k != single.METADATA}
    return {name: encode(_ordered(tensors, to.dtype), {**kept, "format": "pt"})}


def _vllm_files(state: AdapterState, to: Target) -> Files:
    return _peft_files(folded(state), to)


def _vllm_trial(state: AdapterState, to: Target) -> None:
    to_peft(folded(state))


def _gguf_files(state: AdapterState, to: Target) -> Files:
    from omnilora.io import gguf

    return {"adapter.gguf": gguf.written(state, to.model, to.dtype)}


def _gguf_trial(state: AdapterState, to: Target) -> None:
    from omnilora.io import gguf

    gguf.tensors_of(state, to.model)


FORMATS: dict[str, Format] = {f.name: f for f in (
    Format("omnilora", "omnilora's own folder: every form.", _native_files, lambda s, t: None),
    Format("peft", "PEFT's folder.", _peft_files, lambda s, t: to_peft(thinned(s))),
    Format("vllm", "PEFT's folder as servers read it: one rank, α = r, linear LoRA.", _vllm_files, _vllm_trial),
    Format("llama.cpp", "A GGUF adapter for llama.cpp.", _gguf_files, _gguf_trial, True),
    Format("diffusers", "pytorch_lora_weights.safetensors for a diffusers pipeline.",
           lambda s, t: _one_file("pytorch_lora_weights.safetensors", single.diffusers(s, t.part), replace(s, extra={}), t),
           lambda s, t: single.diffusers(s, t.part), True),
    Format("kohya", "kohya's single file: LoRA and DoRA, lora_unet_ and lora_te_ names.",
           lambda s, t: _one_file("adapter.safetensors", single.kohya(s, t.part), s, t),
           lambda s, t: single.kohya(s, t.part), True, False),
    Format("lycoris", "LyCORIS' single file: LoHa, LoKr, (IA)³, OFT, BOFT, GLoRA, differences besides.",
           lambda s, t: _one_file("adapter.safetensors", single.kohya(differences(s, t.model), t.part, False), s, t),
           lambda s, t: single.kohya(differences(s, t.model), t.part, False), True, False),
)}  # fmt: skip
ENDINGS = (".safetensors", ".gguf", ".bin", ".pt", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".txt", ".md", ".zip")  # of files
ALIASES = {"gguf": "llama.cpp", "sglang": "vllm"}


def named(name: str) -> Format:
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise UnknownName(f"No format {name!r}.", f"{nearest(name, FORMATS)} There are: {', '.join(FORMATS)}.")
    return FORMATS[name]


def write(state: AdapterState, path: str | os.PathLike[str], form: Format, to: Target = Target()) -> Path:
    """Write, whole or not at all: a folder, or one file where the format is one and the path has its ending."""
    check_place(path, form)
    if form.own_names and form.name != "omnilora" and names.is_raw(state):
        if to.model is None and any("." not in n for n in state.sites):
            raise NotExpressible("The names of the layers are a file's, where dots are lost.", "Give the model.")
        state = undotted(state) if to.model is None else state
    files = form.files(state, to)
    target = Path(path)
    ((name, data),) = list(files.items()) if form.single else [("", b"")]
    if form.single and target.suffix == Path(name).suffix:
        return write_file(target, data)
    return write_folder(target, files)


def check_place(path: str | os.PathLike[str], form: Format) -> None:
    """Whether a format can be written to ``path``. Raises :class:`BadValue` where its ending is another's."""
    place = Path(path)
    own = {"llama.cpp": ".gguf"}.get(form.name, ".safetensors") if form.single else ""
    if place.suffix.lower() in ENDINGS and place.suffix != own and not place.is_dir():
        wanted = f"a file that ends with {own}, or a folder" if own else "a folder"
        raise BadValue(f"{form.name} is not written to {place.name!r}.", f"Give {wanted}.")
    check_file(place) if own and place.suffix == own else check_folder(place)


def undotted(state: AdapterState) -> AdapterState:
    """A state under dotted names of one part, without the part's beginning."""
    parts = {names.part_of(n)[0] for n in state.sites}
    if len(parts) > 1:
        return state
    extra = {k: v for k, v in state.extra.items() if k != names.NAMES}
    return replace(state, sites={names.part_of(n)[1]: s for n, s in state.sites.items()}, extra=extra)


def write_file(path: Path, data: bytes) -> Path:
    """One file so that a reader sees all of the old or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise FileRefused(f"{path} is a folder.", "Give the path of a file.")
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(fresh, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def refusals(state: AdapterState, form: Format, to: Target = Target()) -> dict[str, str]:
    """Site → why the format cannot hold it, each site asked alone; "" → why it cannot hold the whole. Empty: it can."""
    whole = _refusal(state, form, to)
    if whole is None:
        return {}
    alone = {n: _refusal(replace(state, sites={n: s}), form, to) for n, s in state.sites.items()}
    return {n: why for n, why in alone.items() if why is not None} or {"": whole}


def _refusal(state: AdapterState, form: Format, to: Target) -> str | None:
    try:
        form.trial(state, to)
    except OmniloraError as error:
        return f"{error.message} {error.remedy}".strip()
    return None


# -- reading -----------------------------------------------------------------------------------------------------------

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def recognised(path: Path, quota: int) -> str | None:
    """The format of a path, from names and headers; None where it is none of the table."""
    if path.is_file():
        if path.suffix == ".safetensors":
            return "single" if single.reads(single.inside(path, quota)[0]) else None
        return "pickle" if path.suffix in PICKLES else "gguf" if path.suffix == ".gguf" else None
    if (path / "omnilora.json").exists():
        return "omnilora"
    if (path / "adapter_config.json").exists() and _peft_weights(path) is not None:
        return "peft"
    return "folder of one file" if _only_file(path) is not None else None


def _peft_weights(path: Path) -> Path | None:
    return next((path / n for n in ("adapter_model.safetensors", "adapter_model.bin") if (path / n).is_file()), None)


def _only_file(path: Path) -> Path | None:
    found = [*path.glob("*.safetensors"), *path.glob("*.gguf"), *path.glob("pytorch_lora_weights.bin")]
    return found[0] if len(found) == 1 else None


def read(path: Path, quota: int, model: nn.Module | None = None) -> AdapterState:
    """Any adapter that is not omnilora's own folder. ``model``: for what a file leaves to the model (VeRA's widths).

    Raises: FileRefused for what is no adapter, for pickles that hold more than tensors, and for damaged files.
    """
    kind = recognised(path, quota)
    if kind == "folder of one file":
        return read(_only_file(path), quota, model)  # type: ignore[arg-type]
    if kind == "single":
        header, metadata = single.inside(path, quota)
        if any(k.startswith(PREFIX) for k in header):
            if not (path.parent / "adapter_config.json").is_file():
                raise FileRefused(f"{path.name} has PEFT's names, and no adapter_config.json beside it says its α.",
                                  "Give the folder of both.")  # fmt: skip
            return read(path.parent, quota, model)
        return single.read(read_tensors(path, quota), metadata)
    if kind == "pickle":
        tensors = unpickled(path, quota)
        if single.reads(tensors):
            return single.read(tensors)
        raise FileRefused(f"{path.name} is a pickle of tensors, no adapter of a known format.", "Give the folder of a PEFT adapter.")
    if kind == "gguf":
        from omnilora.io import gguf

        return gguf.read(path, quota)
    if kind == "peft":
        weights = _peft_weights(path)
        assert weights is not None
        tensors = read_tensors(weights, quota) if weights.suffix == ".safetensors" else unpickled(weights, quota)
        config = read_json(path / "adapter_config.json")
        return from_peft(config, tensors, None if model is None else widest(config, model), model)
    if path.is_file() and path.suffix == ".safetensors":
        raise FileRefused(f"{path.name} is no adapter of a known format.", "Its tensors have none of the known endings.")
    pickle = next((p.name for p in path.glob("*") if p.suffix in PICKLES), None)
    if pickle is not None:
        raise FileRefused(f"{path.name} holds {pickle}, a pickle.", "Pickles execute code; convert to safetensors.")
    if not path.exists():
        raise FileRefused(f"{path} does not exist.", "Give an adapter's folder, or its .safetensors or .gguf file.")
    several = sorted(p.name for p in path.glob("*.safetensors"))
    if len(several) > 1:
        raise FileRefused(f"{path} holds {len(several)} files: {', '.join(several[:4])}.", "Give one of them.")
    raise FileRefused(f"{path} holds neither omnilora.json nor an adapter of a known format.")


def widest(config: Mapping[str, Any], model: nn.Module) -> int | None:
    """The largest input width among the layers that a configuration targets."""
    sites = [called_site(n, m) for n, m in model.named_modules() if n and targeted(config.get("target_modules"), n)]
    return max((s.fan_in for s in sites if s is not None), default=None)


def unpickled(path: Path, quota: int) -> dict[str, Tensor]:
    """A pickle of PEFT's, kohya's or diffusers' first versions: tensors and nothing else, by torch's restricted reader."""
    if path.stat().st_size > quota:
        raise FileRefused(f"{path.name} has {path.stat().st_size} bytes.", f"The quota is {quota}.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                unpacked = sum(entry.file_size for entry in packed.infolist())
            if unpacked > min(quota, 2 * path.stat().st_size):  # torch stores, it does not compress
                raise FileRefused(f"{path.name} unpacks to {unpacked} bytes.", "It is no file of torch's.")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileRefused:
        raise
    except Exception as error:  # the reader raises whatever the bytes provoke
        raise FileRefused(f"{path.name} is a pickle that holds more than tensors, or is damaged "
                          f"({type(error).__name__}).", "Convert it to safetensors where you trust it.") from error  # fmt: skip
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise FileRefused(f"{path.name} is a pickle that holds no table of tensors.")
    return {k: v.detach().contiguous() for k, v in data.items()}
