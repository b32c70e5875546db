"""An adapter on disk: safetensors and JSON, written atomically, read within bounds computed from headers.

A folder holds ``omnilora.json`` (method, hyper-parameters, sites, base fingerprints, probe) and one tensor file:
``adapter_model.safetensors`` with ``adapter_config.json`` where PEFT can express the adapter, else
``omnilora.safetensors`` and no ``adapter_config.json``. Saving the same adapter twice gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as encode
from torch import Tensor, nn

from omnilora.core import proven, row
from omnilora.core import state as states
from omnilora.core.attach import find_hub, hub_of
from omnilora.core.fingerprint import Fingerprint
from omnilora.core.row import Row
from omnilora.core.state import AdapterState, Carried
from omnilora.errors import FileRefused, NotExpressible, OmniloraError, UnknownName

FORMAT = 1
MANIFEST, NATIVE = "omnilora.json", "omnilora.safetensors"
OWN = (MANIFEST, NATIVE, "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer.json")
MAX_JSON = 64 << 20
MAX_HEADER = 32 << 20
QUOTA = 16 << 30
REREADS = 100
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Foreign = Callable[[AdapterState], tuple[dict[str, Any], dict[str, Tensor]]]


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> Path:
    """Write a folder so that a reader sees all of the old or all of the new, whatever happens in between.

    Files of other kinds that lie in an older folder stay. Raises :class:`FileRefused` where it holds folders, which
    could not be kept in one step.
    """
    target = Path(path)
    kept = _foreign(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    try:
        fresh.mkdir()
        for name in kept:
            _link(target / name, fresh / name)
        for name, data in files.items():
            with open(fresh / name, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        _sync(fresh)
        _swap(fresh, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _foreign(target: Path, files: Mapping[str, bytes]) -> list[str]:
    """What lies in ``target`` and is neither written now nor of an adapter or checkpoint that was written before."""
    if not target.is_dir():
        return []
    inside = sorted(os.scandir(target), key=lambda e: e.name)
    if folders := [e.name for e in inside if e.is_dir(follow_symlinks=False)]:
        raise FileRefused(f"{target} holds folders ({', '.join(folders[:3])}), which saving there would replace.",
                          f"Name a folder of its own, such as {target / 'adapter'}.")  # fmt: skip
    return [e.name for e in inside if e.name not in files and e.name not in OWN]


def _link(old: Path, new: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; the old folder moves aside first and is removed last."""
    if not target.exists():
        os.rename(fresh, target)
        return
    if not target.is_dir():
        raise FileRefused(f"{target} is a file.", "Give a folder.")
    if _exchange(fresh, target):
        return
    aside = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:12]}")
    os.rename(target, aside)
    os.rename(fresh, target)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux); False where the system cannot."""
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2)
    except (OSError, AttributeError):
        return False
    return bool(done == 0)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def manifest(state: AdapterState, tensor_file: str) -> dict[str, Any]:
    from omnilora import __version__

    carried = {p: {"store": c.store, "said": dict(c.said), "tensors": sorted(c.tensors)} for p, c in state.carried.items()}
    return {"format": FORMAT, "library": __version__, "method": state.method, "hyper": _plain(state.hyper),
            "sites": {n: states.config_of(s) for n, s in state.sites.items()}, "tensors": tensor_file,
            "content": state.content(), "base": {n: asdict(f) for n, f in state.base.items()},
            "probe": _probe(state), "extra": dict(state.extra), **({"carried": carried} if carried else {})}  # fmt: skip


def _plain(hyper: Mapping[str, Any]) -> dict[str, Any]:
    from omnilora.core.parameterization import to_config

    return {k: to_config(v) for k, v in hyper.items()}


def _probe(state: AdapterState) -> dict[str, list[float]]:
    """For each additive low-rank site: ‖ΔW‖ and the norm of its action on a seeded vector."""
    out = {}
    for name, s in state.sites.items():
        try:
            ba = states.delta(s, state).factors()
        except (NotImplementedError, OmniloraError, AttributeError):
            continue
        if ba is None:
            continue
        b, a = ba[0].double(), ba[1].double()
        x = torch.randn(a.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        out[name] = [float(f"{float(v):.9g}") for v in
                     ((((b.mT @ b) * (a @ a.mT)).sum()).clamp_min(0).sqrt(), (b @ (a @ x).unsqueeze(-1)).norm())]  # fmt: skip
    return out


def save(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> Path:
    """Save one adapter of ``model`` into a folder, atomically. Base weights are not written, but those that the original
    base does not give (a quantized base that was chosen together with the adapter)."""
    from omnilora.io import peft

    return save_state(peft.noted(model, states.state(model, adapter)), path)


def save_state(state: AdapterState, path: str | os.PathLike[str]) -> Path:
    """Save an adapter that is a value."""
    return write_folder(path, files_of(state))


def files_of(state: AdapterState) -> dict[str, bytes]:
    """The files of an adapter's folder."""
    from omnilora.io import peft

    files: dict[str, bytes] = {}
    try:
        config, tensors = peft.to_peft(state)
        files["adapter_config.json"] = _json(config)
        files["adapter_model.safetensors"] = encode(_ordered(tensors), {"format": "pt"})
        name = "adapter_model.safetensors"
    except NotExpressible:
        files[NATIVE] = encode(_ordered(state.everything()))
        name = NATIVE
    files[MANIFEST] = _json(manifest(state, name))
    return files


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object within bounds; duplicate keys, NaN and other shapes are refused."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FileRefused(f"{path.name} has {path.stat().st_size} bytes.", f"At most {MAX_JSON} are read.")
        data = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_nan)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, OmniloraError):
            raise
        raise FileRefused(f"{path.name} cannot be read: {str(error)[:200]}.", "The file is damaged.") from error
    if not isinstance(data, dict):
        raise FileRefused(f"{path.name} holds a {type(data).__name__}, not an object.")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise FileRefused("A key occurs twice in the JSON.", "The file is damaged or hostile.")
    return out


def _no_nan(word: str) -> None:
    raise FileRefused(f"The JSON holds {word}.", "The file is damaged.")


def read_header(path: Path, quota: int = QUOTA) -> dict[str, Any]:
    """The checked header of a safetensors file: shapes, offsets and sizes agree before anything is allocated."""
    return _header(path, quota)[0]


def _header(path: Path, quota: int) -> tuple[dict[str, Any], bytes]:
    """The checked header, and the bytes of it and of its length."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise FileRefused(f"{path.name} is truncated.", "It has no header.")
            (length,) = struct.unpack("<Q", head)
            if length > min(MAX_HEADER, size - 8):
                raise FileRefused(f"{path.name} announces a header of {length} bytes.", "It is truncated or hostile.")
            text = f.read(length)
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OmniloraError):
            raise
        raise FileRefused(f"{path.name} cannot be read: {str(error)[:200]}.", "It is no safetensors file.") from error
    if not isinstance(header, dict):
        raise FileRefused(f"{path.name}: the header is no object.")
    spans = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
            count = 1
            for n in shape:
                if not isinstance(n, int) or n < 0:
                    raise ValueError("shape")
                count *= n
            if end - begin != count * _DTYPES[dtype] or begin < 0 or end > size - 8 - length:
                raise ValueError("offsets")
        except (KeyError, TypeError, ValueError) as error:
            raise FileRefused(f"{path.name}: the entry {name[:80]!r} breaks the format ({error}).") from error
        spans.append((begin, end))
    if sum(e - b for b, e in spans) > quota:
        raise FileRefused(f"{path.name} holds {sum(e - b for b, e in spans)} bytes.", f"The quota is {quota}.")
    return header, head + text


def read_tensors(path: Path, quota: int = QUOTA) -> dict[str, Tensor]:
    """The tensors of a safetensors file after its header has been checked."""
    return _tensors(path, quota)[0]


def _tensors(path: Path, quota: int, once: bool = False) -> tuple[dict[str, Tensor], Row | None]:
    """:func:`read_tensors`; with ``once`` as views of one piece of memory, where the file allows it."""
    header, head = _header(path, quota)
    try:
        if once and (found := row.read(path, header, head)) is not None:
            return found
        return dict(parse(path.read_bytes())), None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileRefused(f"{path.name} cannot be read: {str(error)[:200]}.") from error


def load_file(path: str | os.PathLike[str], quota: int = QUOTA, model: nn.Module | None = None) -> AdapterState:
    """Read an adapter into a value: omnilora's folder, PEFT's, or a single file of kohya, LyCORIS, diffusers or llama.cpp.

    Foreign files load as unproven. The sites of a single file have the file's names until it is put on a model. The
    folder of a run stands for its adapter. Where another process replaces the folder meanwhile, it is read again.
    ``model``: the base, for the few files that leave a size to it.
    """
    return _load_file(path, quota, model, False)[0]


def _load_file(path: str | os.PathLike[str], quota: int, model: nn.Module | None, once: bool) -> tuple[AdapterState, Row | None]:
    folder = _of_adapter(Path(path))
    for _ in range(REREADS):
        before = _identity(folder)
        try:
            with _typed(folder.name):
                found = _read(folder, quota, model, once)
        except OmniloraError:
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return found
    raise FileRefused(f"{folder} is replaced faster than it can be read.", "Read it when its writer has finished.")


def _of_adapter(folder: Path) -> Path:
    """The folder of a run stands for its adapter."""
    return folder if (folder / MANIFEST).exists() or not (folder / "adapter" / MANIFEST).exists() else folder / "adapter"


@contextmanager
def _typed(name: str) -> Iterator[None]:
    """What Python says of values of a wrong kind in a file, as a typed error that names the file."""
    try:
        yield
    except OmniloraError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise FileRefused(f"{name} breaks its format: {type(error).__name__} {text}.", "It is damaged.") from error


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Folders are replaced as a whole: the same identity before and after reading means one content."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _read(folder: Path, quota: int, model: nn.Module | None, once: bool) -> tuple[AdapterState, Row | None]:
    from omnilora.io import formats

    if not (folder / MANIFEST).exists():
        return formats.read(folder, quota, model), None
    data = read_json(folder / MANIFEST)
    if data.get("format") != FORMAT:
        raise FileRefused(f"{MANIFEST} has format {data.get('format')!r}.", f"This version reads format {FORMAT}.")
    known = {"format", "library", "method", "hyper", "sites", "tensors", "content", "base", "probe", "extra"}
    if set(data) - {"carried"} != known:
        odd = sorted(set(data) - known - {"carried"})
        raise UnknownName(f"{MANIFEST}: missing {sorted(known - set(data))}, unknown {odd}.",
                          "A newer version wrote it, or it is damaged.")  # fmt: skip
    _check_types(data)
    if data["tensors"] not in (NATIVE, "adapter_model.safetensors"):
        raise FileRefused(f"{MANIFEST} names the tensor file {data['tensors']!r}.")
    tensors, held = _tensors(folder / data["tensors"], quota, once)
    try:
        state = _assemble(data, tensors)
    except OmniloraError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileRefused(f"{MANIFEST} breaks the format: {type(error).__name__} {error}.") from error
    if state.content() != data["content"]:
        raise FileRefused("The tensors are not those that were saved (content hash differs).", "The file is damaged.")
    return state, held


_OBJECTS, _TEXTS = ("hyper", "sites", "base", "extra", "carried"), ("method", "tensors", "content", "library")


def _check_types(data: Mapping[str, Any]) -> None:
    """The outer shape of a manifest, and of what goes with an adapter: labels, a fresh head, added tokens."""
    odd = [k for k in _OBJECTS if not isinstance(data.get(k, {}), dict)] + [k for k in _TEXTS if not isinstance(data[k], str)]
    if odd:
        raise FileRefused(f"{MANIFEST}: {odd[0]!r} is a {type(data[odd[0]]).__name__}.", "It is damaged.")
    extra = data["extra"]
    tokens, labels = extra.get("tokens", {}), extra.get("labels", [])
    fits = {
        "fresh": _all(extra.get("fresh", []), str), "metadata": isinstance(extra.get("metadata", {}), dict),
        "labels": isinstance(labels, list) and not any(isinstance(x, (list, dict)) for x in labels),
        "tokens": isinstance(tokens, dict) and _all(tokens.get("tokens", []), str) and _all(tokens.get("ids", []), int),
    }  # fmt: skip
    if wrong := [k for k, good in fits.items() if not good]:
        raise FileRefused(f"{MANIFEST}: extra[{wrong[0]!r}] has another shape than was saved.", "It is damaged.")


def _fingerprint(name: str, f: Mapping[str, Any]) -> Fingerprint:
    numbers = [float(x) for x in (*f["sketch"], f["norm"])]
    if not (_all(f["shape"], int) and isinstance(f["digest"], str) and all(abs(x) < 1e100 for x in numbers)):
        raise FileRefused(f"{MANIFEST}: the fingerprint of {name[:80]!r} is none.", "It is damaged.")
    return Fingerprint(tuple(f["shape"]), f["digest"], tuple(numbers[:-1]), numbers[-1])


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(v) is kind for v in values)


def _assemble(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> AdapterState:
    from omnilora.io import peft

    hows: dict[str, Any] = {}
    if data["tensors"] != NATIVE:
        tensors = peft.to_native(data["sites"], tensors, hows)
    sites, shared = {}, {}
    expected = set()
    for site, config in data["sites"].items():
        own = {}
        for name in config["roles"]:
            key = f"shared::{config['shared'][name]}" if name in config["shared"] else f"{site}::{name}"
            if key not in tensors and config["how"]["kind"] != "TiedUse":
                raise FileRefused(f"The tensor {key!r} is missing.", "The file is damaged.")
            expected.add(key)
            if name in config["shared"]:
                shared[config["shared"][name]] = tensors[key]
            elif key in tensors:
                own[name] = tensors[key]
        sites[site] = states.site_from_config(config, own, hows)
    carried = {}
    for path, c in data.get("carried", {}).items():
        keys = {name: f"carried::{path}::{name}" for name in c["tensors"]}
        if missing := [k for k in keys.values() if k not in tensors]:
            raise FileRefused(f"The tensors {missing[:4]} are missing.", "The file is damaged.")
        expected |= set(keys.values())
        carried[path] = Carried(str(c["store"]), dict(c["said"]), {n: tensors[k] for n, k in keys.items()})
    extra = set(tensors) - expected
    if extra:
        raise FileRefused(f"Unexpected tensors: {sorted(extra)[:4]}.", "The file is damaged or newer.")
    base = {n: _fingerprint(n, f) for n, f in data["base"].items()}
    return AdapterState(data["method"], data["hyper"], sites, shared, base, data["extra"], carried)


def load(model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, check_base: bool = True,
         quota: int = QUOTA, part: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Put a saved adapter on ``model``, all or nothing, and activate it.

    Args:
        path: what :func:`load_file` reads.
        part: of a file that covers a pipeline, which part ``model`` is: "unet", "te", "te2" ….

    Returns: {"sites", "parameters", "base": verdict, "distance"}. Raises typed errors for damaged files, another
    base, or tensors that do not fit.
    """
    from omnilora.io import peft
    from omnilora.io.names import placed

    key = (os.path.abspath(path), check_base, part)
    folder = _of_adapter(Path(path))
    hub = find_hub(model)
    if hub is not None and (report := proven.again(model, hub, key, folder, name, quota)) is not None:
        return report
    with proven.uncollected():
        seen = proven.stamps(folder)
        found, held = _load_file(path, quota, model, True)
        with _typed(Path(path).name):
            read = placed(found, model, part)
            peft.check_facts(model, read)
            report = states.load_state(model, read, name, check_base=check_base, take=held is not None and read is found)
        if held is not None and held.path.parent == folder and found.method == read.method:
            proven.remember(hub_of(model), model, key, seen, held, name, report)
    return report
