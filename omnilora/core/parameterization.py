"""What an adapter is: a frozen dataclass of hyper-parameters and three pure functions.

``init`` makes tensors and gives each a role; ``delta`` (or ``adapt``) is the paper's equation. Roles, never
names, tell sites how a tensor meets the layer and rules which tensors to group, mask, reset or measure.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.errors import BadValue, UnknownName, nearest

if TYPE_CHECKING:
    from omnilora.core.site import Site

ROLES = ("input", "output", "core", "magnitude", "gate", "router", "own")


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor with its role. ``shared``: one tensor for all sites of the adapter that name the same key."""

    value: Tensor
    role: str
    shared: str | None = None


class Tensors(dict[str, "Leaf | Tensors"]):
    """Named leaves; a wrapper nests its inner parameterization's tensors under a name."""

    def flat(self, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
        for name, item in self.items():
            if isinstance(item, Tensors):
                yield from item.flat(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", item


def input_side(t: Tensor) -> Leaf:
    """(r, in): meets the layer's input."""
    return Leaf(t, "input")


def output_side(t: Tensor) -> Leaf:
    """(out, r): makes the layer's output features."""
    return Leaf(t, "output")


def core(t: Tensor) -> Leaf:
    """Between the two sides: λ, an r×r matrix, a scaling vector, a tensor-train core."""
    return Leaf(t, "core")


def magnitude(t: Tensor) -> Leaf:
    """(out,): one number for each output."""
    return Leaf(t, "magnitude")


def gate(t: Tensor) -> Leaf:
    return Leaf(t, "gate")


def router(t: Tensor) -> Leaf:
    """Reads tokens and chooses experts."""
    return Leaf(t, "router")


def own(t: Tensor) -> Leaf:
    """The adapter's own copy of a base tensor, or of a part of it."""
    return Leaf(t, "own")


def shared(key: str, leaf: Leaf) -> Leaf:
    """``leaf`` stored once for all sites of the adapter that give the same key."""
    return dataclasses.replace(leaf, shared=key)


def kaiming(*shape: int) -> Tensor:
    """U(−1/√fan_in, 1/√fan_in), fan_in = last dimension: Kaiming-uniform with a = √5, LoRA's A."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound)


def normal(std: float, *shape: int) -> Tensor:
    return torch.empty(shape).normal_(0.0, std)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def positive_rank(r: Any, name: str = "r") -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise BadValue(f"{name} = {r!r} is no rank.", f"Give an integer {name} ≥ 1.")


def finite(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:
        wanted = "finite number" if low == -math.inf and high == math.inf else f"number in [{low:g}, {high:g}]"
        raise BadValue(f"{name} = {value!r} is not allowed.", f"Give a {wanted}.")


class Slot(nn.Module):
    """One adapter at one site: its tensors (``p.A``, ``p.inner``), its scale, and where it sits. The ``p`` of equations."""

    site: Site
    scale: float

    if TYPE_CHECKING:  # tensors and inner slots by name

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, how: Parameterization, site: Site, scale: float, adapter: str) -> None:
        super().__init__()
        own = self.__dict__  # none of these is a tensor or a module: what nn.Module's assignment would look for
        own["how"], own["site"], own["scale"], own["adapter"] = how, site, scale, adapter
        self.roles: dict[str, str]
        self.shared: dict[str, str]
        self.marks: dict[str, Any]
        # marks: what rules note about this site (a rank pattern), saved with the adapter
        own["roles"], own["shared"], own["marks"] = {}, {}, {}

    def _get_name(self) -> str:
        return f"{type(self.how).__name__}Slot"

    def fill(self, tensors: Tensors, frozen: frozenset[str], pool: dict[str, nn.Parameter]) -> None:
        """Register leaves as parameters, by nested name. ``pool``: the adapter's shared tensors, by key."""
        for name, leaf in tensors.flat():
            *path, last = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, Slot(self.how, self.site, self.scale, self.adapter))
                owner = owner._modules[step]  # type: ignore[assignment]
            if leaf.shared is None or leaf.shared not in pool:
                parameter = nn.Parameter(leaf.value, requires_grad=not is_still(name, frozen))
                if leaf.shared is not None:
                    pool[leaf.shared] = parameter
            else:
                parameter = pool[leaf.shared]
            owner.register_parameter(last, parameter)
            self.roles[name] = leaf.role
            if leaf.shared is not None:
                self.shared[name] = leaf.shared
        for name, module in self.named_modules() if self._modules else ():
            if name:
                module.roles = {k[len(name) + 1 :]: v for k, v in self.roles.items() if k.startswith(f"{name}.")}  # type: ignore[assignment]

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(nested name, parameter), shared ones included."""
        yield from self.named_parameters(remove_duplicate=False)

    def by_role(self, *roles: str) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in self.tensors():
            if self.roles[name] in roles:
                yield name, tensor


@dataclass(frozen=True)
class Parameterization(ABC):
    """Subclass as a frozen dataclass; define ``init`` and ``delta`` (additive) or ``adapt`` (anything else).

    Fields only store; ``check`` validates. See docs/adding-a-method.md.
    """

    known: ClassVar[dict[str, type[Parameterization]]] = {}
    mergeable: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False  # needs W itself (norms, rows), not only its product with x
    by_size: ClassVar[bool] = False  # shapes of ``init`` on a linear site follow from its sizes; each class says it for itself

    @property
    def exact_gradient(self) -> bool:
        """False where the method stops a gradient on purpose (a norm held constant)."""
        return True

    @property
    def additive(self) -> bool:
        """Whether the adapted map is W + ΔW, ``delta`` giving ΔW."""
        return type(self).adapt is Parameterization.adapt

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Parameterization.known[cls.__name__] = cls

    def check(self) -> None:
        """Raise :class:`~omnilora.errors.BadValue` for hyper-parameters outside their domain."""

    def rank(self) -> int:
        """The largest rank of ΔW, 0 where it is not low-rank."""
        return 0

    def frozen(self) -> frozenset[str]:
        """Nested names of tensors that do not learn; a name that ends in a dot stands for all that is nested there."""
        return frozenset()

    def placed(self, site: Site, model: nn.Module) -> None:
        """Called when a slot was put on ``site``: for what the form needs around the layer (an attention function)."""

    def removed(self, site: Site, model: nn.Module) -> None:
        """Called when the slot was taken off; undoes :meth:`placed`."""

    def first_scale(self, site: Site) -> float:
        """The multiplier s at the start; it lives in the state and is never recomputed."""
        return 1.0

    def init(self, site: Site, seen: Any = None) -> Tensors:
        """Fresh tensors for ``site``; ``seen`` holds observed statistics where a rule asked for them."""
        raise NotImplementedError

    def delta(self, p: Slot, ctx: Context) -> Op:
        """ΔW of an additive parameterization."""
        raise NotImplementedError

    def together(self, slots: Sequence[Slot]) -> Sequence[Any]:
        """What ``delta`` needs of slots whose tensors have the same shapes, made at once (:mod:`omnilora.core.together`)."""
        raise NotImplementedError

    def attend(self, p: Slot, ctx: Context, call: Any) -> Any:
        """What an attention layer's function is given (:class:`omnilora.attention.hook.Call`), changed by the form."""
        return call

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        """The adapted map."""
        return W + self.delta(p, ctx)


@dataclass(frozen=True)
class Factored(Parameterization):
    """A form of rank r with scale α/r and dropout on its input; abstract. Fields of a subclass come after these three."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def check(self) -> None:
        positive_rank(self.r)
        finite(self.alpha, "alpha")
        finite(self.dropout, "dropout", 0.0, 0.999)

    def rank(self) -> int:
        return self.r

    def first_scale(self, site: Site) -> float:
        return self.alpha / self.r


def one_of(value: Any, name: str, *allowed: str) -> None:
    if value not in allowed:
        raise BadValue(f"{name} = {value!r}.", f"Give one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class Wrapper(Parameterization):
    """A form around another one, whose tensors it nests under ``inner``; hyper-parameters follow the inner form."""

    inner: Parameterization

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return self.inner.mergeable

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.inner.reads_weight

    @property
    def exact_gradient(self) -> bool:
        return self.inner.exact_gradient

    def check(self) -> None:
        self.inner.check()

    def rank(self) -> int:
        return self.inner.rank()

    def first_scale(self, site: Site) -> float:
        return self.inner.first_scale(site)

    def frozen(self) -> frozenset[str]:
        return frozenset(f"inner.{n}" for n in self.inner.frozen())


def is_still(name: str, frozen: frozenset[str]) -> bool:
    """Whether :meth:`Parameterization.frozen` names a tensor, or a part in which it is nested."""
    steps = name.split(".")
    return name in frozen or any(f"{'.'.join(steps[:i])}." in frozen for i in range(1, len(steps)))


def is_additive(how: Parameterization) -> bool:
    return how.additive


def to_config(how: Any) -> Any:
    """A parameterization as plain JSON data."""
    if isinstance(how, Parameterization):
        fields = {f.name: to_config(getattr(how, f.name)) for f in dataclasses.fields(how)}
        return {"kind": type(how).__name__, **fields}
    if isinstance(how, (list, tuple)):
        return [to_config(v) for v in how]
    if isinstance(how, dict):
        return {k: to_config(v) for k, v in how.items()}
    return how


def from_config(data: Any) -> Parameterization:
    """The inverse of :func:`to_config`. Only registered classes; nothing is imported or executed by name."""
    if not isinstance(data, dict) or "kind" not in data:
        raise BadValue(f"{data!r} is no parameterization.", "It needs a field 'kind'.")
    known = Parameterization.known
    if data["kind"] not in known:
        from omnilora.core.method import entries

        entries()  # a form comes with its method's file
    if data["kind"] not in known:
        raise UnknownName(f"No parameterization {data['kind']!r}.", nearest(str(data["kind"]), known))
    cls = known[data["kind"]]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {k: v for k, v in data.items() if k != "kind"}
    for key in given:
        if key not in fields:
            raise UnknownName(f"{data['kind']} has no hyper-parameter {key!r}.", nearest(key, fields))

    def back(value: Any) -> Any:
        if isinstance(value, dict) and "kind" in value:
            return from_config(value)
        return tuple(back(v) for v in value) if isinstance(value, list) else value

    made = cls(**{k: back(v) for k, v in given.items()})
    made.check()
    return made


def where_field(how: Parameterization, name: str) -> Callable[[Any], Parameterization] | None:
    """A setter for a field of ``how``, or of the parameterization it wraps; None where neither has it."""
    if name in {f.name for f in dataclasses.fields(how)}:
        return lambda value: dataclasses.replace(how, **{name: value})
    for f in dataclasses.fields(how):
        inner = getattr(how, f.name)
        if isinstance(inner, Parameterization) and (deeper := where_field(inner, name)) is not None:
            return lambda value, f=f, deeper=deeper: dataclasses.replace(how, **{f.name: deeper(value)})  # type: ignore[misc]
    return None
