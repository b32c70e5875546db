"""Where an adapter sits: a weight of a layer, with its geometry. Layer kinds differ here and nowhere else.

A *called* site is a layer whose call is the map (Linear, Conv, Embedding, a block). A *read* site is a tensor that
somebody reads (in_proj of attention, an LSTM's weights, fused experts, a norm, a bias): for one forward of its
layer the tensor is replaced by the adapted one.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core import families
from omnilora.core.op import LINEAR, Geometry, Matrix, Op, like
from omnilora.core.store import Store, store_of
from omnilora.errors import AttachError, NotExpressible

if TYPE_CHECKING:
    from omnilora.core.parameterization import Parameterization


@dataclass(frozen=True)
class ConvGeometry(Geometry):
    """x (N, in, *space). A (r, in/groups · kernel) is a convolution with the layer's stride, padding and dilation,
    B (out, r) one of kernel 1. In a grouped layer every group has the same A and its own rows of B, so that
    ΔW = reshape(B A) on the stored weight."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    pad_mode: str
    pad_twice: tuple[int, ...]

    plain = False

    @property
    def separate(self) -> bool:  # type: ignore[override]
        return self.groups > 1

    def features(self, y: Tensor) -> Tensor:
        return y.movedim(-len(self.kernel) - 1, -1)

    def native(self, y: Tensor) -> Tensor:
        return y.movedim(-1, -len(self.kernel) - 1)

    def _conv(self, x: Tensor, w: Tensor) -> Tensor:
        padding = self.padding
        if self.pad_mode != "zeros":
            x, padding = F.pad(x, self.pad_twice, mode=self.pad_mode), 0
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return conv(x, like(w, x), None, self.stride, padding, self.dilation, self.groups)

    def full(self, x: Tensor, m: Tensor) -> Tensor:
        return self.features(self._conv(x, m.reshape(m.shape[0], -1, *self.kernel)))

    def enter(self, x: Tensor, a: Tensor) -> Tensor:
        w = a.reshape(a.shape[0], -1, *self.kernel)
        if self.groups == 1:
            return self.features(self._conv(x, w))
        h = self.features(self._conv(x, w.repeat(self.groups, *[1] * (w.dim() - 1))))
        return h.unflatten(-1, (self.groups, a.shape[0]))  # (N, *space, groups, r)

    def leave(self, h: Tensor, b: Tensor) -> Tensor:
        if self.groups == 1:
            return F.linear(h, like(b, h))
        by_group = like(b, h).unflatten(0, (self.groups, -1))  # (groups, out/groups, r)
        return torch.einsum("...gr,gor->...go", h, by_group).flatten(-2)

    def tokens(self, x: Tensor) -> Tensor:
        space = tuple(range(-len(self.kernel), 0))
        pooled = self.features(x.mean(space, keepdim=True))  # one token an image
        return pooled if self.groups == 1 else pooled.unsqueeze(-2)


@dataclass(frozen=True)
class EmbeddingGeometry(Geometry):
    """x: ids. The weight (num, dim) is Wᵀ: fan_in = num, fan_out = dim. The padding row never moves."""

    padding: int | None
    scale: float = 1.0  # some families multiply what they look up

    plain = False

    def full(self, x: Tensor, m: Tensor) -> Tensor:
        y = F.embedding(x, m.mT)
        return y if self.scale == 1.0 else y * self.scale

    def enter(self, x: Tensor, a: Tensor) -> Tensor:
        h = F.embedding(x, a.mT)
        h = h if self.scale == 1.0 else h * self.scale
        return h if self.padding is None else h * (x != self.padding).unsqueeze(-1)

    def visible(self, a: Tensor) -> Tensor:
        return a if self.padding is None else a.index_fill(-1, torch.tensor(self.padding, device=a.device), 0.0)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x  # ids have nothing to drop

    def tokens(self, x: Tensor) -> Tensor:
        raise NotExpressible("A router cannot read token ids.", "Leave embeddings out of the targets of this method.")


class BlockGeometry(Geometry):
    """A whole layer with hidden states in and out; it has no matrix."""


@dataclass(frozen=True)
class Layout:
    """How the stored tensor becomes the matrix (…, out, in) and back."""

    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, tuple[int, ...]], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _turn(t: Tensor) -> Tensor:
    return t.mT


def _one(t: Tensor) -> Tensor:
    return t.reshape(1, 1)


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1)


def _column(t: Tensor) -> Tensor:
    return t.unsqueeze(-1)


def _reshape(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return t.reshape(shape)


def _turn_back(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return t.mT.reshape(shape)


PLAIN, TURNED, FLAT, COLUMN = (
    Layout(_same, _reshape), Layout(_turn, _turn_back), Layout(_flat, _reshape), Layout(_column, _reshape))  # fmt: skip


@dataclass(eq=False)
class Site:
    """A weight that can be adapted. ``fan_out``, ``fan_in``: rows and columns of its matrix; ``batch``: leading
    dimensions (experts). ``peers``: all sites of the same adapter with the same parameterization, itself included;
    ``how``: that parameterization."""

    name: str
    layer: nn.Module
    param: str
    kind: str
    role: str
    fan_out: int
    fan_in: int
    layout: Layout
    geometry: Geometry = LINEAR
    called: bool = True
    batch: tuple[int, ...] = ()
    region: tuple[int, int] | None = None  # rows of the output: a block of a fused projection
    peers: tuple[Site, ...] = field(default=(), repr=False)
    how: Parameterization | None = field(default=None, repr=False)  # the form that is planned for it
    host: nn.Module | None = field(default=None, repr=False)  # the layer whose forward reads the tensor, if not ``layer``
    norms: tuple[Any, Any, Tensor] | None = field(default=None, repr=False)  # squared row norms, and of what

    @property
    def key(self) -> str:
        """The part of the name below the host: names the slot in ``state_dict``."""
        local = self.param or "block"
        if self.host is not None and self.host is not self.layer:
            local = f"{self.name.split('.')[-2]}/{local}"
        return local if self.region is None else f"{local}[{self.region[0]}:{self.region[1]}]"

    @property
    def store(self) -> Store:
        return store_of(self.layer, self.param)

    @property
    def W(self) -> Op:
        """The base weight (with its offset) as a map; this is what norms and statistics read."""
        base = Base(self, self.layer)
        return base if self.region is None else _rows(base, self.region)

    def read(self) -> Tensor:
        """The stored weight as a matrix (…, out, in)."""
        if self.kind == "block":
            raise NotExpressible(f"{self.name} is a whole block: it has no weight matrix.")
        return self.layout.matrix(self.store.read())

    def squares(self) -> Tensor:
        """Squared row norms of the weight, (…, out), in fp32 or wider; of a constant one they are kept while it is untouched."""
        held = list(self.store.tensors().values())
        if torch.compiler.is_compiling() or any(_changes(t) for t in held):
            return _squares(self.read())
        now = [(t.data_ptr(), t._version) for t in held]
        same = self.norms is not None and self.norms[1] == now and all(r() is t for r, t in zip(self.norms[0], held, strict=True))
        if self.norms is None or not same:
            with torch.no_grad():
                self.norms = [weakref.ref(t) for t in held], now, _squares(self.read())
        return self.norms[2]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"norms": None}

    def features(self, y: Tensor) -> Tensor:
        return self.geometry.features(y) if isinstance(self.geometry, ConvGeometry) else y

    def native(self, y: Tensor) -> Tensor:
        return self.geometry.native(y) if isinstance(self.geometry, ConvGeometry) else y


def _squares(m: Tensor) -> Tensor:
    return (m if m.dtype == torch.float64 else m.float()).square().sum(-1)


def _changes(t: Tensor) -> bool:
    """Whether t is no plain constant: it learns, has no storage or version of its own, or a transform looks at it."""
    return (t.requires_grad or type(t) not in (Tensor, nn.Parameter) or t.is_meta or t.is_inference()
            or torch._C._functorch.peek_interpreter_stack() is not None)  # fmt: skip


def _rows(op: Op, region: tuple[int, int]) -> Op:
    from omnilora.core.op import Rows

    return Rows(op, *region)


class Base(Op):
    """The layer's own map: applied through the layer's own forward, whatever its kind or quantizer."""

    def __init__(self, site: Site, layer: nn.Module, forward: Callable[..., Any] | None = None,
                 args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.site, self.layer, self.forward = site, layer, forward
        self.args, self.kwargs = args, kwargs or {}
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.rest: tuple[Any, ...] = ()

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.site.geometry

    def known(self, x: Tensor, y: Tensor) -> Base:
        """The same map, with its value at x given."""
        other = Base(self.site, self.layer, self.forward, self.args, self.kwargs)
        other.x, other.y, other.rest = x, y, self.rest
        return other

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        if self.y is not None and self.x is x:
            return self.y
        if self.forward is None:
            y = geo.full(x, self.matrix(geo))
            return y if self.offset is None else y + like(self.offset, y)
        y = self.forward(x, *self.args, **self.kwargs)
        if isinstance(y, tuple):
            self.rest, y = y[1:], y[0]
        self.x, self.y = x, self.site.features(y)
        return self.y

    def matrix(self, geo: Geometry) -> Tensor:
        return self.site.read()

    def squares(self, geo: Geometry) -> Tensor:
        return self.site.squares()

    @property
    def offset(self) -> Tensor | None:
        return self.site.store.offset if self.site.called and self.site.param == "weight" else None

    @property
    def linear(self) -> Op:
        return self if self.offset is None else BaseLinear(self)

    @property
    def plain_weight(self) -> Tensor | None:
        own = getattr(self.forward, "__func__", None) is nn.Linear.forward and not self.args and not self.kwargs
        if not own or self.y is not None:
            return None
        store = self.site.store
        params = self.layer._parameters  # a reparametrized weight is none of them
        if not store.dense or params.get(self.site.param) is None or any(p is not None and p.requires_grad for p in params.values()):
            return None
        return store.read()


class BaseLinear(Op):
    """The layer's map without its bias: from the layer's own forward, so that any quantizer serves."""

    def __init__(self, base: Base) -> None:
        self.base = base

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.base.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        from omnilora.core.store import Dense

        base = self.base
        known = base.y is not None and base.x is x
        if not known and isinstance(base.site.store, Dense):
            return geo.full(x, base.matrix(geo))
        y = base.apply(x, geo)
        return y - like(base.offset, y)  # type: ignore[arg-type]

    def matrix(self, geo: Geometry) -> Tensor:
        return self.base.matrix(geo)

    def squares(self, geo: Geometry) -> Tensor:
        return self.base.squares(geo)


def replaced(base: Op, m: Tensor) -> Op:
    """The map ``base`` with another matrix and the same offset."""
    return Matrix(m, base.offset)


# -- kinds of layers ---------------------------------------------------------------------------------------------------

_ATTENTION = re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv)_?(proj|lin)?$|query|key|value", re.I)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|intermediate|experts?|(^|\.)fc\d?$|linear[12]$|(gate|up|down)_proj|(^|\.)w[123]$", re.I
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|head|heads|output_layer|qa_outputs|cls|decoder\.bias|logits)($|\.)"
)
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|switch|gating)(\.classifier|\.linear|\.layer|\.weight)?$")


def role_of(name: str, layer: nn.Module) -> str:
    """attention, mlp, head, router, embedding, norm or other, from the layer's kind and path."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if "norm" in type(layer).__name__.lower():
        return "norm"
    return _role_by_name(name)


@lru_cache(maxsize=1 << 14)
def _role_by_name(name: str) -> str:
    if _HEAD.search(name):
        return "head"
    if _ROUTER.search(name):
        return "router"
    if _ATTENTION.search(name):
        return "attention"
    if _MLP.search(name) or name.endswith("output.dense"):
        return "mlp"
    return "other"


def _ends_in(names: str) -> Callable[[str, nn.Module], bool]:
    pattern = re.compile(rf"(?:^|\.)(?:{names})$")
    return lambda name, layer: is_linear(layer) and pattern.search(name) is not None


PLACES: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention-layer": lambda name, layer: "is_causal" in vars(layer),  # calls an attention function
    "attention-output": _ends_in(families.ATTENTION_OUT),
    "mlp-output": _ends_in(families.FFN_DOWN),
    "mlp-input": _ends_in(families.FFN_UP),
}


def is_linear(layer: nn.Module) -> bool:
    """Linear in the sense of targets: also transposed storage and layers whose store says so."""
    return isinstance(layer, nn.Linear) or _is_conv1d(layer) or store_of(layer).linear


def _is_conv1d(layer: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" for c in type(layer).__mro__)


def _conv_geometry(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvGeometry:
    return ConvGeometry(
        tuple(layer.kernel_size), tuple(layer.stride), layer.padding, tuple(layer.dilation), layer.groups,
        layer.padding_mode, tuple(layer._reversed_padding_repeated_twice))  # fmt: skip


def called_site(name: str, layer: nn.Module, block: bool = False) -> Site | None:
    """The site of a layer that is called, or None for kinds whose tensors are read."""
    role = role_of(name, layer)
    if block:
        width = _width(layer)
        return Site(name, layer, "", "block", "block", width, width, PLAIN, BlockGeometry())
    if _is_conv1d(layer):
        n_in, n_out = store_of(layer).shape()
        return Site(name, layer, "weight", "linear", role, n_out, n_in, TURNED)
    if is_linear(layer):
        n_out, n_in = store_of(layer).shape()
        return Site(name, layer, "weight", "linear", role, n_out, n_in, PLAIN)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = store_of(layer).shape()
        n_in = int(torch.Size(shape[1:]).numel())
        return Site(name, layer, "weight", "conv", role, shape[0], n_in, FLAT, _conv_geometry(layer))
    if isinstance(layer, nn.Embedding):
        num, dim = store_of(layer).shape()
        return Site(name, layer, "weight", "embedding", role, dim, num, TURNED, EmbeddingGeometry(layer.padding_idx, _lookup_scale(layer)))
    return None


def _lookup_scale(layer: nn.Module) -> float:
    """The constant by which a subclass of nn.Embedding multiplies what it looks up (``embed_scale``)."""
    value = layer._buffers.get("embed_scale", vars(layer).get("embed_scale"))
    return 1.0 if value is None or (isinstance(value, Tensor) and value.is_meta) else float(value)


def source_site(model: nn.Module) -> Site:
    """The root, where a source of context has its tensors."""
    return Site("", model, "", "source", "source", 1, 1, PLAIN)


def _width(layer: nn.Module) -> int:
    for child in layer.modules():
        if "norm" in type(child).__name__.lower():
            for p in child.parameters(recurse=False):
                return p.shape[-1]
    for name, child in layer.named_modules():
        if is_linear(child) and (site := called_site(name, child)) is not None:
            return site.fan_in
    raise AttachError("The width of the block cannot be read from its layers.", "Adapt the layers inside it.")


def read_site(name: str, layer: nn.Module, param: str, transposed: bool = False) -> Site:
    """A tensor of ``layer`` that is read: vectors are (n, 1), matrices (out, in), stacks (experts, out, in)."""
    shape = store_of(layer, param).shape()
    role = role_of(name, layer) if role_of(name, layer) != "other" else role_of(name.rpartition(".")[0], layer)
    path = f"{name}.{param}" if name else param
    if len(shape) == 0:
        return Site(path, layer, param, "tensor", role, 1, 1, Layout(_one, _reshape), called=False)
    if len(shape) == 1:
        return Site(path, layer, param, "tensor", role, shape[0], 1, COLUMN, called=False)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        n_in = int(torch.Size(shape[1:]).numel())
        return Site(path, layer, param, "tensor", role, shape[0], n_in, FLAT, called=False)
    out, inn = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    layout = TURNED if transposed else PLAIN
    return Site(path, layer, param, "tensor", role, out, inn, layout, called=False, batch=shape[:-2])


def inner_reads(layer: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path below the layer, owner, parameter) of matrices that ``layer`` reads instead of calling a child."""
    if isinstance(layer, nn.MultiheadAttention):
        own = ["in_proj_weight"] if layer._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [(n, layer, n) for n in own] + [("out_proj.weight", layer.out_proj, "weight")]
    if isinstance(layer, nn.RNNBase):
        return [(n, layer, n) for n in layer._flat_weights_names if n.startswith("weight")]
    return []


def reader_of(layer: nn.Module, parent: nn.Module | None) -> nn.Module | None:
    """``parent``, where it reads the tensors of ``layer`` instead of calling it."""
    return parent if parent is not None and any(owner is layer for _, owner, _ in inner_reads(parent)) else None
