"""Golden files of other libraries: read with equal outputs, written back with the same tensors. See golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden.make import IDS, KOHYA, LYCORIS, UNET_INPUTS, WEIGHTS, Net
from safetensors.torch import load_file, save_file
from torch import nn

import omnilora as ol
from omnilora.core.method import Method
from omnilora.errors import BadValue, FileRefused, NeedsExtra, NotExpressible, StateMismatch
from omnilora.io import names, single
from omnilora.io.export import convert
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.hadamard import LoHa
from omnilora.parameterizations.kronecker import LoKr
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.svd import SVD

GOLDEN = Path(__file__).parent / "golden"
PEFTS = sorted(p.parent.relative_to(GOLDEN / "peft").as_posix() for p in GOLDEN.glob("peft/*/*/adapter_config.json"))


def run(model):
    with torch.no_grad():
        return model.eval()(IDS)


def gap(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(case, tmp_path):
    path = GOLDEN / "lycoris" / f"{case}.safetensors"
    y = load_file(GOLDEN / "lycoris" / "expected.safetensors")[case]
    model = Net()
    assert gap(run(model), y) > 1e-2
    report = ol.load(model, path)
    assert report["base"] == "unproven"
    assert gap(run(model), y) < 1e-6
    assert json.loads(ol.state(model).extra["metadata"]["ss_network_args"]) == LYCORIS[case]

    ol.export(model, tmp_path / "back.safetensors", "lycoris")
    back, there = load_file(tmp_path / "back.safetensors"), load_file(path)
    assert back.keys() == there.keys()
    for key in there:
        assert back[key].shape == there[key].shape, key
        if not (case == "lokr-whole" and key.endswith("alpha")):  # nobody reads α beside two whole matrices
            torch.testing.assert_close(back[key].float(), there[key].float(), rtol=1e-6, atol=1e-7)
    ol.save(model, tmp_path / "own")
    again = Net()
    assert ol.load(again, tmp_path / "own")["base"] == "same bytes"
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("case", PEFTS)
def test_peft_of_every_version(case):
    path = GOLDEN / "peft" / case
    y = load_file(path / "expected.safetensors")["y"]
    model = Net()
    assert gap(run(model), y) > 1e-4
    ol.load(model, path)
    assert gap(run(model), y) < 1e-6


class Tree(nn.Module):
    """Modules by path, of the shapes of a real model; its forward is not needed."""

    def __init__(self, shapes):
        super().__init__()
        for path, shape in shapes.items():
            owner = self
            *steps, last = path.split(".")
            for step in steps:
                owner = owner._modules.setdefault(step, nn.Module())
            owner._modules[last] = (nn.Identity() if not shape else nn.Linear(shape[1], shape[0]) if len(shape) == 2
                                    else nn.Conv2d(shape[1], shape[0], tuple(shape[2:])))  # fmt: skip


def pipeline():
    shapes = json.loads((GOLDEN / "kohya" / "shapes.json").read_text())
    return nn.ModuleDict({k: Tree(v) for k, v in shapes.items()})


def test_kohya_names_find_their_layers():
    """A real UNet's and text encoder's names, also where the text encoder has lost its text_model."""
    file = GOLDEN / "kohya" / "sd.safetensors"
    state = ol.load_file(file)
    assert names.is_raw(state) and len(state.sites) == 83
    both = names.placed(state, pipeline())
    raw = {names.flat(n) for n in both.sites}
    assert raw == {n.replace("lora_unet_", "unet_").replace("lora_te_text_model_", "text_encoder_") for n in state.sites}
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0" in both.sites
    assert both.sites["unet.mid_block.resnets.0.conv1"].kind == "conv"
    unet = names.placed(state, pipeline()["unet"], part="unet")
    assert len(unet.sites) == 77 and "mid_block.resnets.0.conv1" in unet.sites
    with pytest.raises(BadValue, match="part="):
        names.placed(state, pipeline()["unet"])
    with pytest.raises(BadValue, match="te2"):
        names.placed(state, pipeline()["unet"], part="te2")
    with pytest.raises(StateMismatch, match="no layer"):
        names.placed(state, Net(), part="unet")


@pytest.mark.parametrize("case", KOHYA)
def test_kohya_gives_the_weights_that_its_library_merges(case):
    """On a module of the UNet's names, with its weights at three layers."""
    from omnilora.core.context import Context

    expected = load_file(GOLDEN / "kohya" / "expected.safetensors")
    unet = pipeline()["unet"]
    with torch.no_grad():
        for path in WEIGHTS:
            unet.get_submodule(path).weight.copy_(expected[f"base.{path}"])
    ol.load(unet, GOLDEN / "kohya" / f"{case}.safetensors")
    found = {s.site.name: s for s in ol.slots(unet) if s.site.called}
    assert set(found) == set(WEIGHTS)
    for path, slot in found.items():
        made = slot.how.adapt(slot.site.W, slot, Context()).dense()
        want = expected[f"{case}.{path}"].flatten(1)
        assert gap(want, expected[f"base.{path}"].flatten(1)) > 1e-2
        assert gap(made, want) < 1e-6, path


@pytest.mark.parametrize("case", KOHYA)
def test_kohya_outputs(case):
    pytest.importorskip("diffusers", reason="diffusers is not installed; merged weights are compared without it")
    from golden.make import tiny_unet

    unet = tiny_unet().eval()
    ol.load(unet, GOLDEN / "kohya" / f"{case}.safetensors")
    with torch.no_grad():
        assert gap(unet(**UNET_INPUTS).sample, load_file(GOLDEN / "kohya" / "expected.safetensors")[f"{case}.output"]) < 1e-5


def test_kohya_is_written_as_it_was(tmp_path):
    file = GOLDEN / "kohya" / "sd.safetensors"
    report = convert(file, tmp_path / "a.safetensors", "kohya", pipeline())
    assert report["from"] == "single" and report["worst"] == 0.0
    back, there = load_file(tmp_path / "a.safetensors"), load_file(file)
    want = {k.replace("lora_te_text_model_", "lora_te_"): v.float() for k, v in there.items()}
    assert back.keys() == want.keys() and all(torch.equal(back[k], want[k]) for k in want)
    assert single.inside(tmp_path / "a.safetensors", 1 << 30)[1]["ss_network_dim"] == "2"
    assert convert(file, tmp_path / "b.safetensors", "kohya")["worst"] == 0.0  # nobody needs a model for the same names


def test_ambiguous_names_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})

    tensors = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 4), "lora_unet_a_b_c.lora_up.weight": torch.ones(4, 1)}
    with pytest.raises(StateMismatch, match="fits 2 layers"):
        names.placed(single.read(tensors), Twice())
    dotted = {k.replace("lora_unet_a_b_c", "unet.a.b_c"): v for k, v in tensors.items()}
    assert list(names.placed(single.read(dotted), Twice()).sites) == ["a.b_c"]
    with pytest.raises(NotExpressible, match="underscores"):
        names.raw_names(["a_b.c", "a.b_c"], "unet")


def test_a_linear_layer_stored_as_a_convolution_of_kernel_1():
    tensors = {"lora_unet_q_proj.lora_down.weight": torch.randn(2, 8, 1, 1), "lora_unet_q_proj.lora_up.weight": torch.randn(8, 2, 1, 1),
               "lora_unet_proj.lora_down.weight": torch.randn(2, 4), "lora_unet_proj.lora_up.weight": torch.randn(6, 2)}  # fmt: skip
    state = names.placed(single.read(tensors), Net())
    assert {n: s.kind for n, s in state.sites.items()} == {"q_proj": "linear", "proj": "conv"}
    assert state.sites["q_proj"].scale == 1.0  # no α: the rank
    ol.load_state(Net(), state)


def test_what_is_not_read(tmp_path):
    good = {"lora_unet_q_proj.lora_down.weight": torch.ones(1, 8), "lora_unet_q_proj.lora_up.weight": torch.ones(8, 1)}
    for extra, error, why in [
        ({"bundle_emb.cat.string_to_param.*": torch.ones(1, 4)}, NotExpressible, "embedding"),
        ({"lora_unet_v_proj.bm.weight": torch.ones(2, 2, 1, 1)}, NotExpressible, "GLoRA"),
        ({"lora_unet_v_proj.lambda_layer": torch.ones(1, 2)}, NotExpressible, "T-LoRA"),
        ({"lora_unet_v_proj.oft_blocks": torch.ones(2, 2)}, FileRefused, "fit together"),
        ({"something.else": torch.ones(2)}, FileRefused, "Unexpected"),
        ({"lora_unet_v_proj.lora_down.weight": torch.ones(1, 8)}, FileRefused, "fit together"),
        ({"lora_unet_q_proj.hada_t1": torch.ones(1, 8)}, FileRefused, "unexpected"),
        ({"lora_unet_q_proj.alpha": torch.tensor(float("nan"))}, Exception, ""),
    ]:  # fmt: skip
        save_file({**good, **extra}, tmp_path / "x.safetensors")
        with pytest.raises(error, match=why):
            ol.load_file(tmp_path / "x.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(FileRefused, match="no adapter of a known format"):
        ol.load_file(tmp_path / "y.safetensors")


L = LoRA(r=2, alpha=5.0)
OURS = {
    "kohya": [(L, ["fc_in", "q_proj", "conv", "proj", "groups"]), (DoRA(L), ["q_proj", "conv"]), (SVD(2, 5.0), ["q_proj", "conv"])],
    "lycoris": [(LoHa(2, 5.0), ["q_proj", "conv"]), (LoKr(1, 5.0), ["fc_in", "conv"]), (DoRA(LoHa(2, 5.0)), ["q_proj", "conv"])],
    "diffusers": [(L, ["fc_in", "q_proj", "conv", "proj"]), (DoRA(L), ["q_proj", "conv"])],
}  # fmt: skip


@pytest.mark.parametrize(("target", "how", "targets"), [(t, *row) for t, rows in OURS.items() for row in rows])
def test_ours_written_and_read(target, how, targets, tmp_path):
    model = Net()
    ol.adapt(model, Method("own", how), targets=targets)
    with torch.no_grad():
        for i, (_, p) in enumerate((n, p) for s in ol.slots(model) for n, p in s.tensors()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    report = ol.export(model, tmp_path / "a.safetensors", target)
    assert report["worst"] == 0.0 and Path(report["path"]).is_file()
    again = Net()
    ol.load(again, tmp_path / "a.safetensors")
    assert gap(run(again), run(model)) < 1e-6


def test_sgm_names_need_diffusers():
    """Stable Diffusion's first names on diffusers' UNet: by its own converter, or an error that names the extra."""
    key = "lora_unet_input_blocks_1_1_proj_in"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 4, 1, 1), f"{key}.lora_up.weight": torch.ones(4, 1, 1, 1)}
    model = pipeline()["unet"]
    with pytest.raises(StateMismatch, match="layers_per_block"):
        names.placed(single.read(tensors), model)
    model.config = type("Config", (), {"layers_per_block": 1})()
    try:
        import diffusers.loaders.lora_conversion_utils  # noqa: F401
    except ImportError:
        with pytest.raises(NeedsExtra, match="diffusers"):
            names.placed(single.read(tensors), model)
    else:
        assert list(names.placed(single.read(tensors), model).sites) == ["down_blocks.0.attentions.0.proj_in"]


UNETS = ["present", "older", "processors", "patterns", "dora"]


@pytest.mark.parametrize("case", UNETS)
def test_diffusers_names_find_their_layers(case):
    state = names.placed(ol.load_file(GOLDEN / "diffusers" / f"{case}.safetensors"), pipeline()["unet"])
    ends = {n.rpartition(".attn")[2] if ".attn" in n else n.rpartition(".")[2] for n in state.sites}
    attention = {"1.to_q", "2.to_q", "1.to_out.0", "2.to_out.0"}
    assert ends == (attention if case == "processors" else attention | {"conv1", "proj_in"})
    if case == "patterns":
        ranks = {(s.how.r, round(s.scale, 6)) for n, s in state.sites.items() if n.endswith("to_q")}
        assert ranks == {(2, round(9 / 2**0.5, 6))}


@pytest.mark.parametrize("case", UNETS)
def test_diffusers_outputs(case, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed; names and layouts are tested without it")
    from golden.make import tiny_unet

    y = load_file(GOLDEN / "diffusers" / "expected.safetensors")[case]
    unet = tiny_unet().eval()
    ol.load(unet, GOLDEN / "diffusers" / f"{case}.safetensors")
    with torch.no_grad():
        assert gap(unet(**UNET_INPUTS).sample, y) < 1e-5
    ol.export(unet, tmp_path / "out", "diffusers")
    theirs = tiny_unet().eval()
    theirs.load_lora_adapter(tmp_path / "out", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        assert gap(theirs(**UNET_INPUTS).sample, y) < 1e-5


def test_kohya_outputs_on_a_unet():
    pytest.importorskip("diffusers", reason="diffusers is not installed; names and layouts are tested without it")
    from golden.make import tiny_unet

    unet = tiny_unet().eval()
    ol.load(unet, GOLDEN / "kohya" / "sd.safetensors", part="unet")
    with torch.no_grad():
        assert gap(unet(**UNET_INPUTS).sample, load_file(GOLDEN / "kohya" / "expected.safetensors")["unet"]) < 1e-3  # float16


def sgm_names(layers):
    """diffusers' names of an SDXL UNet's layers → those of Stable Diffusion's first code."""
    blocks = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1"}
    blocks |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in range(2)}
    blocks |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    for i in range(3):
        for kind, at in (("resnets", 0), ("attentions", 1)):
            blocks |= {f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{3 * i + j + 1}.{at}" for j in range(2)}
            blocks |= {f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{3 * i + j}.{at}" for j in range(3)}
        blocks |= {f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * i + 3}.0.op",
                   f"up_blocks.{i}.upsamplers.0": f"output_blocks.{3 * i + 2}.2"}  # fmt: skip
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    out = {}
    for name in layers:
        head = next(b for b in blocks if name == b or name.startswith(f"{b}."))
        tail = name[len(head) :]
        out[name] = blocks[head] + (f".{inner[tail[1:]]}" if ".resnets." in head else tail)
    return out


def test_every_layer_of_sdxl_in_its_first_names():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its converter places these names")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 2))  # fmt: skip
    layers = {n: m.weight.shape for n, m in unet.named_modules() if type(m).__name__ in ("Linear", "Conv2d")}
    assert len(layers) > 300
    tensors = {}
    for name, raw in sgm_names(layers).items():
        key, shape = f"lora_unet_{raw.replace('.', '_')}", layers[name]
        tensors[f"{key}.lora_down.weight"] = torch.zeros(1, *shape[1:])
        tensors[f"{key}.lora_up.weight"] = torch.zeros(shape[0], 1, *(1,) * (len(shape) - 2))
    assert set(names.placed(single.read(tensors), unet).sites) == set(layers)


def test_fluxs_first_names_and_fused_projections():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its converter places these names")
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    tensors = {}
    for name, n_in, n_out in [("double_blocks_0_img_attn_qkv", 3072, 9216), ("single_blocks_0_linear1", 3072, 21504)]:
        tensors |= {f"lora_unet_{name}.lora_down.weight": torch.randn(1, n_in), f"lora_unet_{name}.alpha": torch.tensor(0.5),
                    f"lora_unet_{name}.lora_up.weight": torch.randn(n_out, 1)}  # fmt: skip
    state = names.placed(single.read(tensors), flux)
    assert len(state.sites) == 7
    s = state.sites["transformer_blocks.0.attn.to_k"]
    up, down = (tensors[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{x}.weight"] for x in ("up", "down"))
    assert gap(s.scale * s.tensors["B"] @ s.tensors["A"], 0.5 * up[3072:6144] @ down) < 1e-6


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "my_own_prefix_", "", "unet.", "diffusion_model."])
def test_beginnings(prefix):
    tensors = {}
    for name, shape in (("down.fc_in", (8, 6)), ("q_proj", (8, 8))):
        key = prefix + (name if "." in prefix else name.replace(".", "_"))
        tensors |= {f"{key}.lora_down.weight": torch.randn(2, shape[1]), f"{key}.lora_up.weight": torch.randn(shape[0], 2)}
    assert set(names.placed(single.read(tensors), Net()).sites) == {"down.fc_in", "q_proj"}
    inside = nn.ModuleDict({"model": Net()})
    assert set(names.placed(single.read(tensors), inside).sites) == {"model.down.fc_in", "model.q_proj"}


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_runs_nothing(tmp_path, capsys):
    good = GOLDEN / "peft" / "0.2.0" / "lora"
    for name, data in [("code", {"x": Evil()}), ("list", [torch.zeros(2)]), ("bytes", None)]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
        if data is None:
            (folder / "adapter_model.bin").write_bytes(b"\x80\x04nothing")
        else:
            torch.save(data, folder / "adapter_model.bin")
        with pytest.raises(FileRefused, match=r"adapter_model\.bin"):
            ol.load_file(folder)
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(FileRefused, match=r"evil\.pt"):
        ol.load_file(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out
    tensors = load_file(GOLDEN / "lycoris" / "locon.safetensors")
    torch.save(tensors, tmp_path / "old.pt")
    assert ol.load_file(tmp_path / "old.pt").numel() == ol.load_file(GOLDEN / "lycoris" / "locon.safetensors").numel()
    with pytest.raises(FileRefused, match="quota"):
        ol.load_file(good, quota=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(dtype, tmp_path):
    tensors = {k: v.to(dtype) for k, v in load_file(GOLDEN / "lycoris" / "locon.safetensors").items()}
    save_file(tensors, tmp_path / "half.safetensors")
    state = ol.load_file(tmp_path / "half.safetensors")
    assert torch.equal(state.sites["lycoris_q_proj"].tensors["B"], tensors["lycoris_q_proj.lora_up.weight"].float())


def test_the_page_has_every_format():
    from omnilora.io.formats import FORMATS

    page = (Path(__file__).parent.parent / "docs" / "files.md").read_text(encoding="utf-8")
    assert [f"| `{f.name}` | {f.says} |" for f in FORMATS.values() if f"| `{f.name}` | {f.says} |" not in page] == []


def test_a_state_dict_that_was_saved_by_hand(tmp_path):
    """The adapter's name behind the leaf, copies of saved modules under it, compiled wrappers, no prefix at all."""
    folder = GOLDEN / "peft" / "0.10.0" / "lora"
    tensors, y = load_file(folder / "adapter_model.safetensors"), load_file(folder / "expected.safetensors")["y"]
    loud = {k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            .replace(".norm.", ".norm.modules_to_save.default."): t for k, t in tensors.items()}  # fmt: skip
    loud |= {k.replace(".norm.", ".norm.original_module."): t + 1 for k, t in tensors.items() if ".norm." in k}
    bare = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    compiled = {k.replace("base_model.model.", "base_model.model._orig_mod."): t for k, t in tensors.items()}
    for name, made in (("loud", loud), ("bare", bare), ("compiled", compiled)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        save_file(made, tmp_path / name / "adapter_model.safetensors")
        model = Net()
        ol.load(model, tmp_path / name)
        assert gap(run(model), y) < 1e-6, name


def test_a_file_of_peft_without_its_configuration(tmp_path):
    folder = GOLDEN / "peft" / "0.10.0" / "rslora"
    state = ol.load_file(folder / "adapter_model.safetensors")
    assert state.content() == ol.load_file(folder).content()
    (tmp_path / "x.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(FileRefused, match="adapter_config"):
        ol.load_file(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(FileRefused, match=r"2 files.*Give one"):
        ol.load_file(tmp_path)


@pytest.mark.parametrize("case", ["locon-tucker", "loha", "locon", "dora", "lokr"])
def test_lycoris_to_peft_and_its_reader(case, tmp_path):
    """What PEFT has goes over as it is; a Tucker convolution as the LoRA that it is."""
    peft = pytest.importorskip("peft")
    source = GOLDEN / "lycoris" / f"{case}.safetensors"
    y = load_file(GOLDEN / "lycoris" / "expected.safetensors")[case]
    try:
        report = convert(source, tmp_path / "p", "peft", Net())
    except NotExpressible as error:
        assert "groups" in str(error)  # PEFT's convolutions are not grouped
        tensors = {k: t for k, t in load_file(source).items() if "_groups." not in k}
        save_file(tensors, tmp_path / "some.safetensors")
        model = Net()
        ol.load(model, tmp_path / "some.safetensors")
        y = run(model)
        report = convert(tmp_path / "some.safetensors", tmp_path / "p", "peft", Net())
    assert report["worst"] == 0.0
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "p")).eval()
    with torch.no_grad():
        assert gap(theirs(input_ids=IDS), y) < 1e-5


WRITTEN = {
    "lokr": (LoKr(1, 5.0), ["fc_in", "q_proj", "conv"]), "lokr-both": (LoKr(1, 5.0, both=True), ["q_proj"]),
    "lokr-whole": (LoKr(9, 5.0, factor=2), ["q_proj", "conv"]), "loha": (LoHa(2, 5.0), ["q_proj", "conv", "groups"]),
    "loha-dora": (DoRA(LoHa(2, 5.0)), ["q_proj", "conv"]), "lora": (L, ["q_proj", "conv", "proj", "groups"]),
    "dora": (DoRA(L), ["q_proj", "conv"]), "svd": (SVD(2, 5.0), ["q_proj", "conv"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_lycoris_computes_what_we_wrote(case, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed; its golden files are read and written without it")
    how, targets = WRITTEN[case]
    model = Net()
    ol.adapt(model, Method("own", how), targets=targets)
    with torch.no_grad():
        for i, (_, p) in enumerate((n, p) for s in ol.slots(model) for n, p in s.tensors()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    ol.export(model, tmp_path / "a.safetensors", "lycoris")
    net = Net().eval()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Net"], "target_name": [".*"]})
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), net)
    network.apply_to()
    network.eval()
    assert gap(run(net), run(model)) < 1e-5


def test_convert_on_a_folder_of_diffusers(tmp_path):
    """kohya's file to diffusers' and PEFT's by the names of a saved pipeline; diffusers computes the same."""
    pytest.importorskip("diffusers", reason="diffusers is not installed; conversion on modules is tested without it")
    transformers = pytest.importorskip("transformers")
    from golden.make import tiny_unet
    from typer.testing import CliRunner

    from omnilora.cli.main import app

    home, file = tmp_path / "pipe", GOLDEN / "kohya" / "sd.safetensors"
    tiny_unet().save_pretrained(home / "unet")
    config = transformers.CLIPTextConfig(vocab_size=20, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=8, projection_dim=4)  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(home / "text_encoder")
    (home / "model_index.json").write_text("{}")
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "d"), "--for", "diffusers", "--model", str(home), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["worst"] == 0.0 and len(report["errors"]) == 83
    theirs = tiny_unet().eval()
    theirs.load_lora_adapter(tmp_path / "d", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        y = theirs(**UNET_INPUTS).sample
    assert gap(y, load_file(GOLDEN / "kohya" / "expected.safetensors")["unet"]) < 1e-3  # the file is float16
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "p"), "--model", str(home / "unet"), "--part", "unet"])
    assert done.exit_code == 0, done.output
    unet = tiny_unet().eval()
    ol.load(unet, tmp_path / "p")
    with torch.no_grad():
        assert gap(unet(**UNET_INPUTS).sample, y) < 1e-5


def test_own_copies_are_differences_to_lycoris(tmp_path):
    model = Net()
    ol.adapt(model, Method("own", L), targets=["q_proj"], unfreeze=["norm", "proj"])
    with torch.no_grad():
        for s in ol.slots(model):
            for _, p in s.tensors():
                p.add_(0.3)
    with pytest.raises(NotExpressible, match="difference"):
        ol.export(ol.state(model), tmp_path / "a.safetensors", "lycoris")
    ol.export(model, tmp_path / "a.safetensors", "lycoris")
    leaves = {k.rpartition("lycoris_")[2] for k in load_file(tmp_path / "a.safetensors")}
    assert {"norm.w_norm", "norm.b_norm", "proj.diff", "proj.diff_b", "q_proj.lora_up.weight"} <= leaves
    again = Net()
    ol.load(again, tmp_path / "a.safetensors")
    assert gap(run(again), run(model)) < 1e-6


@pytest.mark.parametrize("case", ["locon", "lokr", "dora"])
def test_our_own_folder_keeps_a_files_names_until_there_is_a_model(case, tmp_path):
    file = GOLDEN / "lycoris" / f"{case}.safetensors"
    path = Path(convert(file, tmp_path / "a", "omnilora")["path"])
    assert sorted(p.name for p in path.iterdir()) == ["omnilora.json", "omnilora.safetensors"], "no half of a PEFT folder"
    model, direct = Net(), Net()
    ol.load(model, path)
    ol.load(direct, file)
    assert torch.equal(run(model), run(direct))


@pytest.mark.parametrize("target", ["kohya", "lycoris", "diffusers", "peft"])
def test_sixteen_bits_with_their_error(target, tmp_path):
    model = Net()
    ol.adapt(model, Method("own", L), targets=["q_proj", "v_proj"])
    with torch.no_grad():
        for s in ol.slots(model):
            s.B.copy_(torch.randn(s.B.shape, generator=torch.Generator().manual_seed(3)))
    report = ol.export(model, tmp_path / "a", target, save_dtype="bf16")
    assert 1e-4 < report["worst"] < 1e-2 and set(report["errors"]) == {"q_proj", "v_proj"}
    (file,) = (tmp_path / "a").glob("*.safetensors")
    assert {t.dtype for t in load_file(file).values() if t.dim()} == {torch.bfloat16}
    again = Net()
    ol.load(again, tmp_path / "a")
    assert 0 < gap(run(again), run(model)) < 1e-2
    for bad, form in (("fp8", target), ("bf16", "omnilora")):
        with pytest.raises(BadValue, match="save_dtype"):
            ol.export(model, tmp_path / "b", form, save_dtype=bad)
