"""Every error omnilora raises on purpose: one base class, stable codes, the offending value and the remedy.

The codes are part of the public interface: programs may compare them, so a code is never renamed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import ModuleType

LONGEST = 1200  # characters of a message: a hostile value is shown in part


class OmniloraError(Exception):
    """Base class. ``code`` is stable; ``remedy`` says what to do.

    Args:
        message: what is wrong, with the name and the value.
        remedy: what the user can do about it.
    """

    code = "omnilora"

    def __init__(self, message: str, remedy: str = "") -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 200]} … {message[-199:]}"
        self.message, self.remedy = message, remedy
        super().__init__(f"[{self.code}] {message}" + (f" {remedy}" if remedy else ""))


class UnknownName(OmniloraError):
    """A method, hyper-parameter, command or field that does not exist."""

    code = "unknown-name"


class BadValue(OmniloraError, ValueError):
    """A value outside its domain (rank ≤ 0, NaN, a label outside the set …)."""

    code = "bad-value"


class TargetError(OmniloraError):
    """A target pattern matches nothing, is wholly shadowed, or names a layer that cannot be adapted."""

    code = "target"


class AttachError(OmniloraError):
    """A layer was changed, replaced or resized after it was adapted, or cannot be adapted in place."""

    code = "attach"


class ContextError(OmniloraError):
    """Rows, segments or tasks of a call do not fit the tensors that reach a layer."""

    code = "context"


class NotMergeable(OmniloraError):
    """The map depends on its input, so no weight equals it."""

    code = "not-mergeable"


class MergeRefused(OmniloraError):
    """Merging would change the answers by more than the allowed bound."""

    code = "merge-refused"


class NotExpressible(OmniloraError):
    """A foreign format, or a kind of layer, cannot express this adapter."""

    code = "not-expressible"


class FileRefused(OmniloraError):
    """A file is truncated, hostile, of another format, or breaks its own header."""

    code = "file-refused"


class StateMismatch(OmniloraError):
    """Tensors of a state are missing, unexpected or misshapen for the model."""

    code = "state-mismatch"


class BaseMismatch(OmniloraError):
    """The adapter was made for another base model."""

    code = "base-mismatch"


class DataError(OmniloraError):
    """Malformed training or evaluation data; the message names file and line."""

    code = "data"


class RunError(OmniloraError):
    """Training was driven in a way that would lose a part of the method (no run, a loss nobody collected …)."""

    code = "run"


class HubError(OmniloraError):
    """The Hugging Face Hub cannot be reached, or refuses."""

    code = "hub"


class NeedsExtra(OmniloraError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""

    code = "needs-extra"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that names the closest known names, or the first few when none is close."""
    known = sorted(set(known))
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.4) or known[:count]
    return f"Nearest: {', '.join(close)}." if close else "None exist."


def need(module: str, extra: str) -> ModuleType:
    """Import ``module`` or raise :class:`NeedsExtra` naming ``pip install omnilora[extra]``."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NeedsExtra(f"{module!r} is not installed.", f"Run: pip install 'omnilora[{extra}]'.") from error
