"""Adapters on the Hugging Face Hub: pushed with a card that says what they are, pulled into a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omnilora.core.files import QUOTA, load_file, read_json, write_folder
from omnilora.core.method import entries
from omnilora.core.parameterization import to_config
from omnilora.core.state import AdapterState
from omnilora.errors import BadValue, HubError, need
from omnilora.io.yaml import read_yaml

FILES = ("omnilora.json", "omnilora.safetensors", "adapter_config.json", "adapter_model.safetensors")
PULLED = ["*.json", "*.safetensors", "*.gguf", "README.md"]


def _parts(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """(what is pushed: an adapter's folder or file, the folder of its run)."""
    home = Path(path)
    if home.is_dir() and not any((home / f).is_file() for f in FILES) and (home / "adapter").is_dir():
        home = home / "adapter"
    run = home.parent if home.name == "adapter" and (home.parent / "config.yaml").is_file() else None
    return home, run


def card(path: str | os.PathLike[str], repo: str = "") -> str:
    """The README of an adapter: method, base, settings, data and figures, as far as its folder or its run knows them."""
    home, run = _parts(path)
    state = load_file(home)
    config = _config(run)
    report = read_json(run / "report.json") if run is not None and (run / "report.json").is_file() else {}
    known = entries()[state.method].card if state.method in entries() else None
    base = _base(home, config)
    peft = (home / "adapter_config.json").is_file()
    front = {"library_name": "peft" if peft else "omnilora", **({"base_model": base} if base else {}),
             "tags": sorted({"omnilora", "adapter", state.method, *(("lora",) if peft else ())})}  # fmt: skip
    title = repo.rpartition("/")[2] or home.resolve().name
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", "", f"# {title}", ""]
    if known is not None:
        source = f" (arXiv:{known.arxiv})" if known.arxiv else ""
        lines += [f"An adapter by {known.title}{source}. {known.purpose}", ""]
    lines += ["| | |", "| --- | --- |", f"| method | {state.method} |", f"| base | {base or 'not recorded'} |",
              f"| sites | {len(state.sites)} |", f"| parameters | {state.numel():,} |", f"| content | `{state.content()}` |"]  # fmt: skip
    lines += [f"| {k} | {json.dumps(to_config(v), ensure_ascii=False)} |" for k, v in sorted(state.hyper.items())]
    lines += _training(config, report)
    lines += ["", "```python", *_usage(state, repo, base), "```", ""]
    return "\n".join(lines)


def _config(run: Path | None) -> Mapping[str, Any]:
    if run is None:
        return {}
    data = read_yaml(run / "config.yaml")
    return data if isinstance(data, dict) else {}


def _base(home: Path, config: Mapping[str, Any]) -> str:
    """The base by its public name; a path on this machine is nobody's business but its last part."""
    named = config.get("model")
    if named is None and home.is_dir() and (home / "adapter_config.json").is_file():
        named = read_json(home / "adapter_config.json").get("base_model_name_or_path")
    return _public(named)


def _public(name: Any) -> str:
    text = str(name or "")
    local = text.startswith((".", "/", "~")) or "\\" in text or Path(text).exists()
    return Path(text).name if local else text


def _training(config: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    rows = [(k, config[k]) for k in ("lr", "batch_size", "steps", "epochs", "seed", "dtype") if config.get(k) is not None]
    data = config.get("data")
    names = [_public(d) for d in (data if isinstance(data, list) else [data]) if isinstance(d, str)]
    out = ["", "## Training", "", "| | |", "| --- | --- |"] if rows or names or report else []
    out += [f"| data | {', '.join(names)} |"] if names else []
    out += [f"| {k} | {v} |" for k, v in rows]
    if report:
        out += [f"| updates | {report.get('steps')} of {report.get('total_steps')} ({report.get('stopped')}) |"]
        losses = [x for x in report.get("losses") or [] if x is not None]
        out += [f"| training loss | {losses[0]:.4g} → {losses[-1]:.4g} |"] if losses else []
        last = (report.get("evaluations") or [{}])[-1]
        out += [f"| evaluation: {k} | {v:.4g} |" for k, v in sorted(last.items()) if k != "step" and isinstance(v, (int, float))]
    return out


def _usage(state: AdapterState, repo: str, base: str) -> list[str]:
    return ["import omnilora as ol", "", f'ol.load(model, ol.pull("{repo or "user/adapter"}"))'
            + (f"  # model: {base}" if base else "")]  # fmt: skip


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """The Hub's errors as one typed error that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.OfflineModeIsEnabled as error:
        raise HubError(f"{what}: offline mode is on (HF_HUB_OFFLINE).", "Unset it, or give a folder on this machine.") from error
    except hub.LocalEntryNotFoundError as error:
        raise HubError(f"{what}: the Hub cannot be reached and nothing of it is on this machine.",
                       "Go online once, or copy the adapter's folder here and give its path.") from error  # fmt: skip
    except (hub.RevisionNotFoundError, hub.RemoteEntryNotFoundError) as error:
        raise HubError(f"{what}: there is no such revision or file.", "Look at the repository's list of files.") from error
    except (hub.RepositoryNotFoundError, hub.GatedRepoError, hub.LocalTokenNotFoundError) as error:
        raise HubError(f"{what}: the repository does not exist, or this machine has no right to it.",
                       "Check the name user/adapter, and log in: hf auth login.") from error  # fmt: skip
    except hub.HFValidationError as error:
        raise BadValue(f"{what}: {' '.join(str(error).split())[:160]}", "Give a name like user/adapter.") from error
    except Exception as error:  # its HTTP client's errors have no common class with others
        raise HubError(f"{what}: {type(error).__name__} {' '.join(str(error).split())[:160]}.",
                       "Is this machine online? A folder on this machine needs no Hub.") from error  # fmt: skip


def _named(repo: str) -> None:
    parts = repo.split("/")
    if len(parts) != 2 or not all(parts) or any(c.isspace() for c in repo):
        raise BadValue(f"repo = {repo!r} is no name of a repository.", "Give a name like user/adapter.")


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    message: str = "Adapter",
    revision: str | None = None,
) -> dict[str, Any]:
    """Upload an adapter with its card. What it says of its base and data are names, no paths of this machine.

    Args:
        path: the folder of an adapter or of a run, or a single file.
        repo: "user/adapter"; made where it does not exist.

    Returns: {"repo", "url", "files"}. Raises: HubError where the Hub cannot be reached or refuses, FileRefused for what is no
    adapter: nothing is uploaded that cannot be read here.
    """
    _named(repo)
    home, _ = _parts(path)
    text = card(path, repo)
    library: Any = need("huggingface_hub", "train")
    sources = [home] if home.is_file() else [home / f for f in FILES if (home / f).is_file()]
    with tempfile.TemporaryDirectory() as scratch:
        for source in sources:
            shutil.copyfile(source, Path(scratch) / source.name)
        (Path(scratch) / "README.md").write_text(text, encoding="utf-8")
        with _talking(f"Pushing to {repo}"):
            api = library.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            info = api.upload_folder(repo_id=repo, folder_path=scratch, commit_message=message, revision=revision)
    return {"repo": repo, "url": str(getattr(info, "commit_url", info)), "files": sorted([*(s.name for s in sources), "README.md"])}


def pull(
    repo: str,
    path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    quota: int = QUOTA,
) -> Path:
    """Download an adapter and check that it can be read. Files that are no data of an adapter are left on the Hub.

    Args:
        path: where its folder is written, whole or not at all; default: where the Hub's cache has it.
        revision: a branch, a tag or a commit.

    Returns: the folder, for ``ol.load``. Raises: HubError, and FileRefused for what is no adapter.
    """
    _named(repo)
    library: Any = need("huggingface_hub", "train")
    with _talking(f"Pulling {repo}"):
        found = Path(library.snapshot_download(repo, revision=revision, allow_patterns=PULLED))
    load_file(found, quota)
    if path is None:
        return found
    return write_folder(path, {p.name: p.read_bytes() for p in sorted(found.iterdir()) if p.is_file()})
