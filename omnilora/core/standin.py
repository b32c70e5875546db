"""A layer's class replaced in place by a subclass of it: one class for each pair, with the own class's name, and pickling."""

from __future__ import annotations

import threading
import types
import weakref
from typing import Any

_made: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()
_making = threading.Lock()


class StandIn:
    """A mixin that stands before a layer's own class in the MRO. A layer pickles as its own class, the mixin and its state."""

    _stands: tuple[type[StandIn], type]  # the mixin and the own class, on every class that `stand_in` made

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not outermost(self):
            return super().__reduce_ex__(protocol)
        state = getattr(self, "__getstate__", lambda: self.__dict__)()
        return _blank, self._stands, state


def stand_in(mixin: type[StandIn], own: type) -> type:
    """The subclass of ``own`` whose methods are ``mixin``'s first."""
    with _making:
        made = _made.get((mixin, own))
        if made is None:
            names = {"_stands": (mixin, own), "__module__": own.__module__, "__qualname__": own.__qualname__}
            made = _made[mixin, own] = types.new_class(own.__name__, (mixin, own), {}, lambda space: space.update(names))
        return made


def outermost(layer: Any) -> bool:
    """Whether a stand-in is the layer's class: not so where none is, or where somebody has put another class on top since."""
    return "_stands" in vars(type(layer))


def own_class(layer: Any) -> Any:
    """The class ``layer`` had before something stood in for it."""
    return type(layer)._stands[1]


def _blank(mixin: type[StandIn], own: type) -> Any:
    made: Any = stand_in(mixin, own)
    return made.__new__(made)
