"""Whether the Hugging Face Hub answers, asked once and shortly, before anything that would ask again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from omnilora.errors import HubError, need

PATIENCE = 5.0  # seconds


def answers(name: str, kind: str = "model") -> bool:
    """Whether the Hub says anything of a repository, be it that there is none."""
    hub = need("huggingface_hub", "train")
    errors = need("huggingface_hub.errors", "train")
    try:
        hub.HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return True
    except Exception:  # its HTTP client's errors have no common class with others
        return False
    return True


@contextmanager
def asked(name: str, kind: str = "model") -> Iterator[bool]:
    """Whether the Hub answers; where it does not, what is inside sees this machine's copies only."""
    if answers(name, kind):
        yield True
        return
    with mock.patch.object(need("huggingface_hub.constants", "train"), "HF_HUB_OFFLINE", True):
        yield False


@contextmanager
def asked_for_model(name: str, local: bool = False) -> Iterator[None]:
    """Around the loading of a model: the Hub is asked where it answers, and left alone where not.

    Args:
        local: it lies on this machine; the Hub has no part in it.

    Raises :class:`~omnilora.errors.HubError` for a model that is neither here nor can be asked for.
    """
    if local:
        yield
        return
    with asked(name) as reached:
        if not reached and not isinstance(need("huggingface_hub", "train").try_to_load_from_cache(name, "config.json"), str):
            raise HubError(f"{name!r} is no folder here, and the Hugging Face Hub cannot be reached.",
                           "Check the name and the connection, or give a folder or a .gguf file.")  # fmt: skip
        yield
