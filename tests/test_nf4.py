"""Four-bit codes: the bytes of bitsandbytes, the errors of the QLoRA paper's codebooks, refusals."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from omnilora.errors import BadValue, FileRefused, NotExpressible, StateMismatch
from omnilora.plans import native
from omnilora.stores import nf4
from omnilora.stores.nf4 import codebook, from_bnb_state, quantize, to_bnb_state

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# widths that bitsandbytes' AVX-512 kernel dequantizes by their definition: multiples of 64, or not of 16
SHAPES = [(1,), (2,), (3,), (63,), (64,), (65,), (127,), (4096,), (5, 7), (33, 2), (3, 100), (2, 3, 50), (64, 64),
          (1, 128), (7, 30), (96, 192), (31, 129), (576, 1536), (300, 257), (8, 2, 3, 3)]  # fmt: skip


@pytest.fixture(scope="module")
def bnb():
    library = pytest.importorskip("bitsandbytes")
    if tuple(int(p) for p in library.__version__.split(".")[:2]) < (0, 50):
        pytest.skip("the CPU quantizer changed in 0.50")
    return library


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; zeros may differ in sign."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def theirs(bnb, w, quant_type="nf4", double=True, blocksize=64):
    return bnb.functional.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=double)


def assert_stored_equal(bnb, w, quant_type="nf4", double=True, blocksize=64):
    codes, state = theirs(bnb, w, quant_type, double, blocksize)
    want = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    packed = quantize(w, blocksize, quant_type, double)
    mine = to_bnb_state(packed)
    assert set(mine) == set(want)
    assert [k for k in want if not same(mine[k], want[k])] == []
    return packed, codes, state


def awkward(kind: str) -> torch.Tensor:
    torch.manual_seed(5)
    w = torch.randn(70, 100)
    edges = (nf4.normal_float(4)[1:] + nf4.normal_float(4)[:-1]) / 2
    one = torch.ones(1)
    return {
        "zeros": torch.zeros(4, 64),
        "zero tail": torch.cat([w.view(-1)[:640], torch.zeros(20)]),
        "zero blocks": w * (torch.arange(7000).view(70, 100) // 64 % 3 > 0),
        "constant": torch.full((16, 64), -0.3),
        "ties": torch.cat([torch.cat([s * edges, s * edges.nextafter(one * 2), s * edges.nextafter(-one * 2), s * one,
                                      torch.zeros(18)]) for s in (1.0, 0.37, -3.0, 1e-20)]),
        "denormal": w[:64, :64] * 1e-39,
        "mixed denormal": w * torch.logspace(-42, 0, 70)[:, None],
        "huge": w / w.abs().max() * 3e38,
        "outlier": w + 1e4 * (torch.rand(70, 100) > 0.999),
        "transposed": w.t(),
    }[kind]  # fmt: skip


AWKWARD = [
    "zeros",
    "zero tail",
    "zero blocks",
    "constant",
    "ties",
    "denormal",
    "mixed denormal",
    "outlier",
    "transposed",
]


def test_codebooks_are_the_published_ones(bnb):
    for name in ("nf4", "fp4"):
        assert same(codebook(name), bnb.functional.get_4bit_type(name, device="cpu"))
    assert same(nf4.dynamic_map(), bnb.functional.create_dynamic_map())


def test_codebooks_by_formula():
    nf3, nf2 = (-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1), (-1, 0, 0.3379, 1)
    assert torch.allclose(codebook("nf3"), torch.tensor(nf3), atol=1e-4)
    assert torch.allclose(codebook("nf2"), torch.tensor(nf2), atol=1e-4)
    assert nf4.dynamic_map().unique().numel() == 256
    for name in ("nf4", "nf3", "nf2", "fp4"):
        w = codebook(name).repeat(8)[:64].repeat(6, 1) * 0.75
        assert same(quantize(w, quant_type=name, double=False).dequantize(), w), "a codebook is its own quantization"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_and_every_value(bnb, shape, dtype, double):
    torch.manual_seed(len(shape) + shape[0])
    w = (torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1))).to(dtype)
    for quant_type in ("nf4", "fp4"):
        packed, codes, state = assert_stored_equal(bnb, w, quant_type, double)
        for out in DTYPES:
            state.dtype = out
            assert same(packed.dequantize(out).view(-1), bnb.functional.dequantize_4bit(codes, state).reshape(-1))
        assert packed.dequantize().dtype == dtype and packed.dequantize().shape == w.shape


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_values(bnb, kind, double):
    for dtype in DTYPES:
        w = awkward(kind).to(dtype)
        for quant_type in ("nf4", "fp4"):
            packed, codes, state = assert_stored_equal(bnb, w, quant_type, double)
            mine, their = packed.dequantize(), bnb.functional.dequantize_4bit(codes, state).reshape(w.shape)
            differs = mine != their
            flushed = (their == 0) & (mine.abs() < torch.finfo(torch.float32).tiny)
            assert not (differs & ~(flushed & (dtype == torch.bfloat16))).any()


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_other_block_sizes(bnb, blocksize):
    w = torch.randn(96, blocksize) if blocksize < 2048 else torch.randn(33, blocksize)
    packed, codes, state = assert_stored_equal(bnb, w, blocksize=blocksize)
    assert same(packed.dequantize(), bnb.functional.dequantize_4bit(codes, state))


def test_scales_beyond_fp32_are_refused_only_when_summed(bnb):
    w = awkward("huge")
    assert_stored_equal(bnb, w, double=False)
    with pytest.raises(BadValue, match="double=False"):
        quantize(w)


def test_the_eight_bit_scales_over_many_blocks(bnb):
    for spread in (0.01, 1.0, 3.0):
        w = torch.randn(4096, 512) * (spread * torch.randn(4096, 1)).exp()
        assert_stored_equal(bnb, w)


def test_quantizing_in_parts_changes_nothing(monkeypatch):
    w = torch.randn(100, 70)
    whole = quantize(w)
    monkeypatch.setattr(nf4, "_WRITE", 1 << 12)
    parts = quantize(w)
    assert same(whole.codes, parts.codes) and same(whole.absmax, parts.absmax)
    value = whole.dequantize()
    monkeypatch.setattr(nf4, "_READ", 1)
    assert same(whole.dequantize(), value)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear4bit_state_dict_both_ways(bnb, dtype, quant_type, double):
    w = torch.randn(96, 192).to(dtype)
    layer = bnb.nn.Linear4bit(192, 96, bias=False, quant_type=quant_type, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double, module=layer
    )
    want = layer.to("cpu").state_dict()
    packed = quantize(w, quant_type=quant_type, double=double)
    mine = to_bnb_state(packed)
    assert list(mine) == list(want) and all(same(mine[k], want[k]) for k in want)
    back = from_bnb_state({f"a.{k}": v for k, v in want.items()}, "a.weight")
    for field in fields(packed):
        a, b = getattr(packed, field.name), getattr(back, field.name)
        assert same(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    loaded = bnb.nn.Params4bit.from_prequantized(
        mine.pop("weight"), {k.removeprefix("weight."): v for k, v in mine.items()}, device="cpu"
    )
    assert same(bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state), packed.dequantize())


def test_codes_stored_as_another_dtype(bnb):
    w = torch.randn(64, 64)
    codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    kept = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert same(from_bnb_state(kept).dequantize(), bnb.functional.dequantize_4bit(codes, state))


def test_rows_of_a_multiple_of_16_follow_the_definition(bnb):
    """bitsandbytes' own dequantization of such rows depends on the CPU; ours is by flat block."""
    w = torch.randn(37, 96)
    packed, *_ = assert_stored_equal(bnb, w, double=False)
    code = torch.cat([packed.codes >> 4, packed.codes & 15], 1).view(-1).long()
    want = codebook("nf4")[code] * packed.absmax.repeat_interleave(64)[: w.numel()]
    assert same(packed.dequantize().view(-1), want)
    assert ((packed.dequantize() - w).norm() / w.norm()).item() < 0.1


@pytest.mark.parametrize(("quant_type", "error"), [("nf4", 0.092), ("fp4", 0.122), ("nf3", 0.202), ("nf2", 0.563)])
def test_error_on_a_normal_matrix(quant_type, error):
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    once, twice = (quantize(w, quant_type=quant_type, double=d).dequantize() for d in (False, True))
    relative = [((v - w).norm() / w.norm()).item() for v in (once, twice)]
    assert relative[0] == pytest.approx(error, abs=0.003)
    assert relative[1] == pytest.approx(relative[0], rel=1e-3)


def test_double_quantization_moves_no_scale_by_a_percent():
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    once, twice = quantize(w, double=False), quantize(w)
    assert ((twice.scales() - once.absmax) / once.absmax).abs().max() < 0.01


def test_storage():
    w = torch.randn(1024, 1024, dtype=torch.bfloat16)
    once, twice = quantize(w, double=False), quantize(w)
    assert once.bits == 4.5 and twice.bits == pytest.approx(4.127, abs=5e-4)
    assert twice.nbytes == 1024 * 1024 // 2 + 16384 + 64 * 4 + 256 * 4 + 4 < 0.53 * w.numel()
    assert {t.untyped_storage().nbytes() for t in (twice.codes, twice.absmax)} == {524288, 16384}, "no view of more"


@pytest.mark.parametrize("shape", [(96, 176), (7, 33), (513,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf3"])
def test_the_kernel_gives_the_same_bits(shape, dtype, quant_type, monkeypatch):
    torch.manual_seed(0)
    for size, double in ((32, False), (64, True), (256, True)):
        packed = nf4.quantize(torch.randn(shape) * 3, size, quant_type, double)
        fast = packed.dequantize(dtype)
        made = nf4._native(packed.codes.reshape(-1), nf4._TABLES[quant_type], packed.scales(), fast.numel(), size, dtype)
        assert (made is None) == (native.library() is None)
        with monkeypatch.context() as m:
            m.setattr(nf4, "_native", lambda *a: None)
            slow = packed.dequantize(dtype)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(fast.view(bits), slow.view(bits))


def test_dequantize_under_a_dispatch_mode_is_made_of_operations():
    from torch.utils.flop_counter import FlopCounterMode

    packed = nf4.quantize(torch.randn(8, 64))
    want = packed.dequantize()
    with FlopCounterMode(display=False):
        assert nf4._native(packed.codes.reshape(-1), nf4._TABLES["nf4"], packed.scales(), 512, 64, torch.float32) is None
        assert torch.equal(packed.dequantize(), want)


def test_dequantize_compiles_to_the_same_values():
    packed = quantize(torch.randn(64, 192))
    assert same(torch.compile(lambda p: p.dequantize(torch.bfloat16), backend="aot_eager", fullgraph=True)(packed),
                packed.dequantize(torch.bfloat16))  # fmt: skip


def test_float64_is_rounded_to_fp32():
    w = torch.randn(32, 64, dtype=torch.float64)
    packed = quantize(w)
    assert packed.dtype == torch.float32 and same(packed.codes, quantize(w.float()).codes)
    assert same(packed.dequantize(torch.float64), packed.dequantize().double())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_is_refused(bad, dtype):
    w = torch.randn(10, 10, dtype=dtype)
    for at in (0, 99):
        spoilt = w.clone()
        spoilt.view(-1)[at] = bad
        with pytest.raises(BadValue, match="infinite or NaN"):
            quantize(spoilt)


def test_refusals():
    w = torch.randn(8, 8)
    for call in (lambda: quantize(w, 48), lambda: quantize(w, quant_type="nf5"), lambda: quantize(torch.empty(0)),
                 lambda: quantize(torch.ones(4, dtype=torch.int32)),
                 lambda: quantize(w).dequantize(torch.int8)):  # fmt: skip
        with pytest.raises(BadValue):
            call()
    with pytest.raises(NotExpressible):
        to_bnb_state(quantize(w, quant_type="nf3"))


def test_malformed_states_are_refused():
    good = to_bnb_state(quantize(torch.randn(64, 64)))
    key = "weight.quant_state.bitsandbytes__nf4"
    text = bytes(good[key].tolist())

    def described(old: bytes, new: bytes) -> dict:
        assert old in text
        return good | {key: torch.tensor(list(text.replace(old, new)), dtype=torch.uint8)}

    for spoilt in (
        described(b"{", b"["),
        described(b"float32", b"load"),
        described(b"[64, 64]", b"[-64, -64]"),
        described(b'"nf4"', b'"fp4"'),
        described(b'"blocksize": 64', b'"blocksize": 0'),
        good | {key: torch.tensor([300.5])},
        good | {"weight.quant_map": torch.zeros(16)},
    ):
        with pytest.raises(FileRefused):
            from_bnb_state(spoilt)
    for spoilt in ({k: v for k, v in good.items() if k != gone} for gone in good if gone != "weight.nested_absmax"):
        with pytest.raises(StateMismatch):
            from_bnb_state(spoilt)
    with pytest.raises(StateMismatch):
        from_bnb_state(described(b"[64, 64]", b"[64, 640]"))
    with pytest.raises(StateMismatch):
        from_bnb_state(good | {"weight.absmax": good["weight.absmax"].float()})
    assert same(from_bnb_state(good).dequantize(), replace(from_bnb_state(good)).dequantize())
