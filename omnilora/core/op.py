"""The algebra of weight maps: small, lazy, each operator checked against its dense twin.

An operator is an affine map y = M x + c from a layer's input to its output *features* (last dimension).
What a layer's input looks like — tokens, an image, ids — is the business of a :class:`Geometry`, which
knows how a matrix meets that input. An operator itself is geometry-free:

    W + D          the sum of two maps                     s * D         a scaled map
    chain(P, λ, Q) P Λ Q; a vector stands for its diagonal W.linear      M without c

``chain`` reads like the formula: its leftmost matrix leaves to the output, its rightmost one meets the input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.errors import NotMergeable

Scalar = float | Tensor
low_rank_squares: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None] | None = None  # see Sum.squares; None: by its formula


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the dtype of the data ``x``; integer data (token ids) leaves it alone."""
    return t.to(x.dtype) if x.is_floating_point() and t.dtype != x.dtype else t


class Geometry:
    """How matrices meet the input of a plain linear layer, x (..., in). Other layer kinds override."""

    plain = True  # the input is already a batch of row vectors: fused kernels apply
    separate = False  # blocks of outputs read inputs of their own: a matrix after the layer is no weight of it

    def full(self, x: Tensor, m: Tensor) -> Tensor:
        """x, m (out, in) → (..., out)."""
        return F.linear(x, like(m, x))

    def enter(self, x: Tensor, a: Tensor) -> Tensor:
        """x, a (r, in) → (..., r), features last."""
        return F.linear(x, like(a, x))

    def leave(self, h: Tensor, b: Tensor) -> Tensor:
        """h (..., r), b (out, r) → (..., out)."""
        return F.linear(h, like(b, h))

    def visible(self, a: Tensor) -> Tensor:
        """The part of an input-side matrix that can act (a padding row of an embedding cannot)."""
        return a

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, True)

    def tokens(self, x: Tensor) -> Tensor:
        """What a router reads: (..., in), broadcastable against the output features."""
        return x


LINEAR = Geometry()


class Op(ABC):
    """A lazy affine map. Applying it never forms its matrix."""

    geometry: Geometry = LINEAR

    @abstractmethod
    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        """Layer input → (..., out), features last."""

    @abstractmethod
    def matrix(self, geo: Geometry) -> Tensor:
        """M, (..., out, in). Raises :class:`NotMergeable` where the map depends on x. Dropout is the identity."""

    @property
    def offset(self) -> Tensor | None:
        """c of y = M x + c, (out,), or None."""
        return None

    @property
    def linear(self) -> Op:
        """The map without its offset."""
        return self

    @property
    def plain_weight(self) -> Tensor | None:
        """M (out, in) where applying the map is F.linear with it and the offset, all constants; None elsewhere."""
        return None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B, A) with M == B @ A where the map is low-rank by construction."""
        return None

    def squares(self, geo: Geometry) -> Tensor:
        """Squared row norms of M in fp32 (or wider), (..., out)."""
        return _wide(self.matrix(geo)).square().sum(-1)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        """y + self(x) in y's dtype, fused where that is cheaper."""
        return y + like(self.apply(x, geo), y)

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x, self.geometry)

    def dense(self) -> Tensor:
        return self.matrix(self.geometry)

    def sq_norm(self) -> Tensor:
        return self.squares(self.geometry)

    def __add__(self, other: Op) -> Op:
        return Sum(self, other)

    def shift(self, c: Tensor | None) -> Op:
        """y + c; None leaves the map as it is. (A method: compiled code refuses ``op + tensor``.)"""
        return self if c is None else Shift(self, c)

    def __rmul__(self, s: Scalar) -> Op:
        return self if isinstance(s, float) and s == 1.0 else Scaled(s, self)

    def transpose(self) -> Op:
        """Mᵀ as a map of row vectors (the second use of a tied weight)."""
        return Transposed(self)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


@dataclass(frozen=True, eq=False)
class Matrix(Op):
    """A dense M (out, in) with an optional offset."""

    m: Tensor
    c: Tensor | None = None

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        y = geo.full(x, self.m)
        return y if self.c is None else y + like(self.c, y)

    def matrix(self, geo: Geometry) -> Tensor:
        return self.m

    @property
    def offset(self) -> Tensor | None:
        return self.c

    @property
    def linear(self) -> Op:
        return Matrix(self.m)


@dataclass(frozen=True, eq=False)
class Shift(Op):
    """op + c."""

    op: Op
    c: Tensor

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.op.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        y = self.op.apply(x, geo)
        return y + like(self.c, y)

    def matrix(self, geo: Geometry) -> Tensor:
        return self.op.matrix(geo)

    def squares(self, geo: Geometry) -> Tensor:
        return self.op.squares(geo)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.op.factors()

    @property
    def offset(self) -> Tensor | None:
        inner = self.op.offset
        return self.c if inner is None else inner + self.c

    @property
    def linear(self) -> Op:
        return self.op.linear


@dataclass(frozen=True, eq=False)
class Scaled(Op):
    """s · op, for a float or a 0-D tensor."""

    s: Scalar
    op: Op

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.op.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.s * self.op.apply(x, geo)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        if isinstance(self.op, Chain):
            return self.op.add_scaled(y, x, geo, self.s)
        return y + like(self.apply(x, geo), y)

    def matrix(self, geo: Geometry) -> Tensor:
        return self.s * self.op.matrix(geo)

    def squares(self, geo: Geometry) -> Tensor:
        return self.s**2 * self.op.squares(geo)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        ba = self.op.factors()
        return None if ba is None else (self.s * ba[0], ba[1])

    @property
    def offset(self) -> Tensor | None:
        c = self.op.offset
        return None if c is None else self.s * c

    @property
    def linear(self) -> Op:
        return Scaled(self.s, self.op.linear)

    def transpose(self) -> Op:
        return Scaled(self.s, self.op.transpose())


@dataclass(frozen=True, eq=False)
class Sum(Op):
    """left + right."""

    left: Op
    right: Op

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.left.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.right.add_to(self.left.apply(x, geo), x, geo)

    def matrix(self, geo: Geometry) -> Tensor:
        left, right = self.left.matrix(geo), self.right.matrix(geo)
        wide = torch.promote_types(left.dtype, right.dtype)
        return left.to(wide) + right.to(wide)

    def squares(self, geo: Geometry) -> Tensor:
        # ‖W + BA‖² = ‖W‖² + 2⟨W Aᵀ, B⟩ + ⟨B (A Aᵀ), B⟩, row by row, without forming BA
        ba = self.right.factors()
        if ba is None:
            return super().squares(geo)
        b, a = _wide(ba[0]), geo.visible(_wide(ba[1]))
        w, w_a = self.left.squares(geo), self.left.matrix(geo).to(a.dtype) @ a.mT
        found = None if low_rank_squares is None else low_rank_squares(w, w_a, b, a)
        return w + ((2 * w_a + b @ (a @ a.mT)) * b).sum(-1) if found is None else found

    def factors(self) -> tuple[Tensor, Tensor] | None:
        left, right = self.left.factors(), self.right.factors()
        if left is None or right is None:
            return None
        return torch.cat((left[0], right[0]), -1), torch.cat((left[1], right[1]), -2)

    @property
    def offset(self) -> Tensor | None:
        a, b = self.left.offset, self.right.offset
        return b if a is None else a if b is None else a + b

    @property
    def linear(self) -> Op:
        return Sum(self.left.linear, self.right.linear)

    def transpose(self) -> Op:
        return Sum(self.left.transpose(), self.right.transpose())


@dataclass(frozen=True, eq=False)
class Residual(Op):
    """I + op, where input and output are the same features."""

    op: Op

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.op.add_to(x, x, geo)

    def matrix(self, geo: Geometry) -> Tensor:
        m = self.op.matrix(geo)
        return m + torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)

    @property
    def offset(self) -> Tensor | None:
        return self.op.offset

    @property
    def linear(self) -> Op:
        return Residual(self.op.linear)

    def transpose(self) -> Op:
        return Residual(self.op.transpose())


class Part(ABC):
    """A link of a chain that is no matrix: it acts on features (..., n), or on the layer's input."""

    merges = False  # the identity in matrix(), factors() and squares()

    @abstractmethod
    def __call__(self, h: Tensor, x: Tensor, geo: Geometry, entered: bool) -> Tensor:
        """h: what has come so far; x: the layer's input; ``entered`` after the first matrix."""


@dataclass(frozen=True, eq=False)
class Dropout(Part):
    """Drops entries in training mode; the identity wherever a matrix is asked for."""

    p: float
    training: bool = False
    merges = True

    def __call__(self, h: Tensor, x: Tensor, geo: Geometry, entered: bool) -> Tensor:
        if self.p == 0.0 or not self.training:
            return h
        return F.dropout(h, self.p, True) if entered else geo.drop(h, self.p)


@dataclass(frozen=True, eq=False)
class Gate(Part):
    """Multiplies features by f(x), x being the tokens of the layer's input: a diagonal that depends on the token. A linear
    router R (n, in) that f asks first is better told: f(x Rᵀ) then, in the dtype of R. f does not write into what it is given."""

    f: Callable[[Tensor], Tensor]
    R: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The diagonal for tokens x (…, in)."""
        return self.f(x if self.R is None else F.linear(x.to(self.R.dtype), self.R))

    def __call__(self, h: Tensor, x: Tensor, geo: Geometry, entered: bool) -> Tensor:
        return h * like(self.of(geo.tokens(x)), h)


@dataclass(frozen=True, eq=False)
class Map(Part):
    """Any function of the features, with or without tensors of its own."""

    f: Callable[[Tensor], Tensor]

    def __call__(self, h: Tensor, x: Tensor, geo: Geometry, entered: bool) -> Tensor:
        return self.f(h)


Link = Tensor | Op | Part


def _not_one_weight(part: Part) -> NotMergeable:
    return NotMergeable(f"A {type(part).__name__.lower()} of the input stands in the product.",
                        "It can be applied, not merged or factored.")  # fmt: skip


def chain(*links: Link) -> Chain:
    """chain(P, λ, Q) is the map P Λ Q: matrices (out, in), vectors as diagonals, operators, parts."""
    return Chain(links)


@dataclass(frozen=True, eq=False)
class Chain(Op):
    """A product of links, applied from the right."""

    links: tuple[Link, ...]

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        for link in reversed(self.links):  # the one that meets the input
            if isinstance(link, Op):
                return link.geometry
        return LINEAR

    def _ends(self) -> tuple[int, int]:
        """Positions of the leftmost and the rightmost matrix or operator."""
        at = [i for i, k in enumerate(self.links) if isinstance(k, Op) or (isinstance(k, Tensor) and k.dim() > 1)]
        return (at[0], at[-1]) if at else (-1, -1)

    def _run(self, x: Tensor, geo: Geometry, stop: int) -> Tensor:
        """Apply links from the right down to, and without, position ``stop``."""
        first, last = self._ends()
        h, entered = x, False
        for i in range(len(self.links) - 1, stop, -1):
            link = self.links[i]
            if isinstance(link, Part):
                h = link(h, x, geo, entered)
            elif isinstance(link, Op):
                h, entered = link.apply(h, LINEAR if entered else geo), True
            elif link.dim() == 1:
                h = h * like(link, h)
            elif i == first == last:
                h, entered = geo.full(h, geo.visible(link)), True
            elif i == last:
                h, entered = geo.enter(h, link), True
            elif i == first:
                h = geo.leave(h, link)
            else:
                h = LINEAR.leave(h, link)
        return h

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self._run(x, geo, -1)

    def add_to(self, y: Tensor, x: Tensor, geo: Geometry) -> Tensor:
        return self.add_scaled(y, x, geo, 1.0)

    def add_scaled(self, y: Tensor, x: Tensor, geo: Geometry, s: Scalar) -> Tensor:
        """y + s · self(x): the scale meets the narrow features, the last product adds in place of a second pass."""
        b = self.links[0]
        if not isinstance(b, Tensor) or b.dim() != 2 or len(self._matrices()) < 2:
            return y + like(s * self.apply(x, geo), y)
        if b.shape[-1] == 0:
            return y
        h = self._run(x, geo, 0)
        if not (isinstance(s, float) and s == 1.0):
            h = h * s
        if geo.plain and y.dtype == h.dtype and y.is_floating_point():
            flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), like(b, h).t())
            return flat.view(y.shape)
        return y + like(geo.leave(h, b), y)

    def _matrices(self) -> list[Link]:
        return [k for k in self.links if isinstance(k, Op) or (isinstance(k, Tensor) and k.dim() > 1)]

    def _tensors(self, geo: Geometry) -> list[Tensor]:
        """The links as matrices and vectors; the rightmost matrix as far as the geometry lets it act."""
        _, last = self._ends()
        out: list[Tensor] = []
        for i, link in enumerate(self.links):
            if isinstance(link, Part):
                if not link.merges:
                    raise _not_one_weight(link)
            elif isinstance(link, Op):
                out.append(link.matrix(geo if i == last else LINEAR))
            else:
                out.append(geo.visible(link) if i == last and link.dim() > 1 else link)
        return out

    def matrix(self, geo: Geometry) -> Tensor:
        return _product(self._tensors(geo))

    def squares(self, geo: Geometry) -> Tensor:
        first = self.links[0]
        if isinstance(first, Tensor) and first.dim() == 1 and len(self.links) == 2 and isinstance(self.links[1], Op):
            return _wide(first).square() * self.links[1].squares(geo)
        if isinstance(first, Tensor) and first.dim() > 1 and (ba := self.factors()) is not None:
            b, a = _wide(ba[0]), geo.visible(_wide(ba[1]))
            return ((b @ (a @ a.mT)) * b).sum(-1)
        return super().squares(geo)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        matrices = self._matrices()
        if len(matrices) == 1 and isinstance(matrices[0], Op):
            inner = matrices[0].factors()
            if inner is None:
                return None
            at = next(i for i, k in enumerate(self.links) if k is matrices[0])
            swapped: tuple[Link, ...] = (*self.links[:at], *inner, *self.links[at + 1 :])
            return Chain(swapped).factors()
        if len(matrices) < 2 or any(isinstance(k, Op) for k in matrices):
            return None
        tensors = self._tensors(LINEAR)
        at = max(i for i, t in enumerate(tensors) if t.dim() > 1)  # A and the diagonals right of it
        return _product(tensors[:at]), _product(tensors[at:])

    @property
    def offset(self) -> Tensor | None:
        c: Tensor | None = None
        for link in reversed(self.links):
            if isinstance(link, Op):
                c = link.offset if c is None else link.apply(_wide(c), LINEAR)
            elif isinstance(link, Tensor) and c is not None:
                c = link * c if link.dim() == 1 else link @ c
            elif isinstance(link, Part) and c is not None and not link.merges:
                raise _not_one_weight(link)
        return c

    @property
    def linear(self) -> Op:
        return Chain(tuple(k.linear if isinstance(k, Op) else k for k in self.links))

    def transpose(self) -> Op:
        def turn(link: Link) -> Link:
            if isinstance(link, Op):
                return link.transpose()
            return link.mT if isinstance(link, Tensor) and link.dim() > 1 else link

        return Chain(tuple(turn(k) for k in reversed(self.links)))


def _product(tensors: list[Tensor]) -> Tensor:
    """The product of matrices (…, out, in) and vectors (diagonals), narrow side first."""
    if len(tensors) == 1:
        return torch.diag(tensors[0]) if tensors[0].dim() == 1 else tensors[0]
    left, right = tensors[0], tensors[1]
    if left.dim() == 1 and right.dim() == 1:
        joined = left * right
    elif left.dim() == 1:
        joined = left.unsqueeze(-1) * right
    elif right.dim() == 1:
        joined = left * right
    else:
        wide = torch.promote_types(left.dtype, right.dtype)
        joined = left.to(wide) @ right.to(wide)
    return _product([joined, *tensors[2:]])


@dataclass(frozen=True, eq=False)
class Lerp(Op):
    """(1 − w) · old + w · new: an adapter at weight w, a float, a 0-D tensor, or gates (rows, 1, …) of the batch."""

    w: Scalar
    old: Op
    new: Op

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.old.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        y, z = self.old.apply(x, geo), self.new.apply(x, geo)
        w = self.w
        if isinstance(w, Tensor) and w.dim() > 0:
            w = w.reshape(*w.shape, *[1] * (y.dim() - w.dim()))
        return y + (w.to(y.dtype) if isinstance(w, Tensor) else w) * (z - y)

    def matrix(self, geo: Geometry) -> Tensor:
        if isinstance(self.w, Tensor) and self.w.dim() > 0:
            raise NotMergeable("Each row has an adapter of its own.", "Activate one set for the whole model first.")
        old = self.old.matrix(geo)
        return old + self.w * (self.new.matrix(geo) - old)

    @property
    def offset(self) -> Tensor | None:
        a, b = self.old.offset, self.new.offset
        if a is None and b is None:
            return None
        zero = torch.zeros_like(a if a is not None else b)  # type: ignore[arg-type]
        a, b = zero if a is None else a, zero if b is None else b
        return a + self.w * (b - a)

    @property
    def linear(self) -> Op:
        return Lerp(self.w, self.old.linear, self.new.linear)


def weigh(w: Scalar, old: Op, new: Op) -> Op:
    """``new`` at weight w beside ``old``; where new = old + D this is old + w·D, with no cancellation."""
    if isinstance(w, float) and w == 1.0:
        return new
    if isinstance(new, Sum) and new.left is old and not (isinstance(w, Tensor) and w.dim() > 0):
        return Sum(old, Scaled(w, new.right))
    return Lerp(w, old, new)


@dataclass(frozen=True, eq=False)
class Rows(Op):
    """Rows [start, stop) of a map's output: one block of a fused projection."""

    op: Op
    start: int
    stop: int

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.op.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.op.apply(x, geo)[..., self.start : self.stop]

    def matrix(self, geo: Geometry) -> Tensor:
        return self.op.matrix(geo)[..., self.start : self.stop, :]

    def squares(self, geo: Geometry) -> Tensor:
        return self.op.squares(geo)[..., self.start : self.stop]

    @property
    def offset(self) -> Tensor | None:
        c = self.op.offset
        return None if c is None else c[self.start : self.stop]

    @property
    def linear(self) -> Op:
        return Rows(self.op.linear, self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Splice(Op):
    """``op`` with the output rows [start, start + n) replaced by those of ``part``."""

    op: Op
    start: int
    stop: int
    part: Op

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.op.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        y = self.op.apply(x, geo)
        return torch.cat((y[..., : self.start], self.part.apply(x, geo), y[..., self.stop :]), -1)

    def matrix(self, geo: Geometry) -> Tensor:
        m = self.op.matrix(geo)
        return torch.cat((m[..., : self.start, :], self.part.matrix(geo).to(m.dtype), m[..., self.stop :, :]), -2)

    @property
    def offset(self) -> Tensor | None:
        c, part = self.op.offset, self.part.offset
        if c is None and part is None:
            return None
        if c is None:
            c = part.new_zeros(self.op.matrix(self.op.geometry).shape[-2])  # type: ignore[union-attr]
        part = torch.zeros_like(c[self.start : self.stop]) if part is None else part
        return torch.cat((c[: self.start], part.to(c.dtype), c[self.stop :]))

    @property
    def linear(self) -> Op:
        return Splice(self.op.linear, self.start, self.stop, self.part.linear)


@dataclass(frozen=True, eq=False)
class Transposed(Op):
    """Mᵀ by its dense matrix; operators that can be turned cheaply override ``transpose``."""

    op: Op

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.full(x, self.matrix(geo))

    def matrix(self, geo: Geometry) -> Tensor:
        return self.op.matrix(self.op.geometry).mT

    def transpose(self) -> Op:
        return self.op


def softmax(logits: Tensor) -> Tensor:
    """Gates in fp32 at least, whatever the dtype of the logits."""
    return torch.softmax(_wide(logits), -1)
