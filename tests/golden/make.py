"""Makes the golden files of this folder with the libraries that own the formats. See README.md.

    python make.py lycoris|kohya|diffusers|peft
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
IDS = torch.tensor([[3, 7, 1, 2, 4, 5], [5, 8, 0, 6, 1, 1]])


class Net(nn.Module):
    """A linear layer below a dot, a norm, attention's names, convolutions of kernel 3 (also grouped) and 1, an embedding."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="golden", to_dict=lambda: {"model_type": "golden", "_name_or_path": ""}, get=lambda *a: None)
        self.table = nn.Embedding(9, 6)
        self.down = nn.ModuleDict({"fc_in": nn.Linear(6, 8)})
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 6)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=(2, 1))
        self.proj = nn.Conv2d(4, 6, 1)
        self.groups = nn.Conv2d(6, 4, (3, 2), groups=2)
        n = 0
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.sin(torch.arange(n, n + p.numel(), dtype=torch.float64) * 1.7).view(p.shape) * 0.6)
                n += p.numel()

    def forward(self, input_ids):
        e = self.table(input_ids)
        v = self.v_proj(torch.tanh(self.q_proj(self.norm(self.down["fc_in"](e)))))
        images = torch.stack((v, e, v * e), 1)
        return torch.cat((v.flatten(), self.groups(self.proj(self.conv(images))).flatten()))


def stir(named, zero=()):
    """Numbers of a fixed wave in every trained tensor."""
    n = 5
    with torch.no_grad():
        for name, p in named:
            if name.endswith("scalar"):
                p.fill_(0.7)
                continue
            p.add_((torch.sin(torch.arange(n, n + p.numel(), dtype=torch.float64) * 2.3) * 0.25).view(p.shape).to(p.dtype))
            n += p.numel()


def contiguous(tensors):
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


LYCORIS = {
    "locon": dict(algo="lora"),
    "locon-tucker": dict(algo="lora", use_tucker=True),
    "locon-norm-rs": dict(algo="lora", train_norm=True, rs_lora=True),
    "locon-scalar": dict(algo="lora", use_scalar=True),
    "dora": dict(algo="lora", dora_wd=True),
    "dora-input": dict(algo="lora", dora_wd=True, wd_on_output=False),
    "loha": dict(algo="loha"),
    "loha-tucker": dict(algo="loha", use_tucker=True),
    "loha-dora": dict(algo="loha", dora_wd=True),
    "lokr": dict(algo="lokr", linear_dim=1),
    "lokr-both": dict(algo="lokr", linear_dim=1, decompose_both=True),
    "lokr-tucker": dict(algo="lokr", linear_dim=1, use_tucker=True),
    "lokr-whole": dict(algo="lokr", full_matrix=True),
    "lokr-unbalanced": dict(algo="lokr", linear_dim=1, factor=2, unbalanced_factorization=True),
    "lokr-dora-input": dict(algo="lokr", linear_dim=1, dora_wd=True, wd_on_output=False),
    "full": dict(algo="full", train_norm=True),
    "ia3": dict(algo="ia3"),
    "oft": dict(algo="diag-oft"),
    "boft": dict(algo="boft", linear_dim=2),
    "glora": dict(algo="glora"),
    "oft-bounded": dict(algo="diag-oft", constraint=0.01, rescaled=True),
}


def lycoris():
    from lycoris import LycorisNetwork, create_lycoris

    (HERE / "lycoris").mkdir(exist_ok=True)
    expected = {}
    for name, options in LYCORIS.items():
        some = ["q_proj", "conv"] if options["algo"] in ("boft", "glora") else [".*"]  # sizes that halve, and no groups
        LycorisNetwork.apply_preset({"target_module": [] if len(some) > 1 else ["Net"], "target_name": some})
        torch.manual_seed(0)
        net = Net()
        wrapped = create_lycoris(net, 1.0, **{"linear_dim": 2, "linear_alpha": 3, "preset": "full", **options})
        wrapped.apply_to()
        stir(wrapped.named_parameters())
        expected[name] = net.eval()(IDS).detach()
        save_file(contiguous(wrapped.state_dict()), HERE / "lycoris" / f"{name}.safetensors",
                  {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(options)})  # fmt: skip
    save_file(expected, HERE / "lycoris" / "expected.safetensors")


def tiny_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4, attention_head_dim=2)  # fmt: skip


UNET_INPUTS = dict(sample=torch.sin(torch.arange(192.0)).view(1, 3, 8, 8), timestep=torch.tensor([7]),
                   encoder_hidden_states=torch.cos(torch.arange(12.0)).view(1, 3, 4))  # fmt: skip


WEIGHTS = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in")
KOHYA = {
    "lora": dict(algo="lora"), "locon-tucker": dict(algo="lora", use_tucker=True), "dora": dict(algo="lora", dora_wd=True),
    "loha": dict(algo="loha"), "lokr": dict(algo="lokr", factor=2), "full": dict(algo="full"),
}  # fmt: skip


def kohya():
    """Names and layouts of a real UNet and of CLIP's names, by LyCORIS' kohya network."""
    from lycoris.kohya import create_network
    from transformers import CLIPTextConfig, CLIPTextModel

    (HERE / "kohya").mkdir(exist_ok=True)
    config = CLIPTextConfig(vocab_size=20, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=8, projection_dim=4)  # fmt: skip
    unet, text = tiny_unet(), CLIPTextModel(config)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as preset:
        preset.write('enable_conv = true\nunet_target_module = ["Transformer2DModel", "ResnetBlock2D"]\nunet_target_name = []\n'
                     'text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]\ntext_encoder_target_name = []\n')  # fmt: skip
        preset.flush()
        network = create_network(1.0, 2, 1.0, None, text, unet, conv_dim=1, conv_alpha=1.0, algo="lora", preset=preset.name)
    network.apply_to(text, unet, True, True)
    stir(network.named_parameters())
    with torch.no_grad():
        y = unet(**UNET_INPUTS).sample
    # transformers 5 has no text_model between CLIPTextModel and its encoder; the files of the world have it
    named = {k.replace("lora_te_encoder", "lora_te_text_model_encoder"): v.half() for k, v in network.state_dict().items()}
    save_file(contiguous(named), HERE / "kohya" / "sd.safetensors",
              {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1.0"})  # fmt: skip
    shapes = {"unet": _shapes(unet), "text_encoder": _shapes(text)}
    (HERE / "kohya" / "shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")
    expected = {"unet": y}
    for name, options in KOHYA.items():
        unet = tiny_unet()
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as preset:
            preset.write('enable_conv = true\nunet_target_module = []\ntext_encoder_target_module = []\ntext_encoder_target_name = []\n'
                         f"unet_target_name = {json.dumps(list(WEIGHTS))}\n")  # fmt: skip
            preset.flush()
            network = create_network(1.0, 2, 3.0, None, text, unet, preset=preset.name, **{"conv_dim": 2, "conv_alpha": 3.0, **options})
        network.apply_to(text, unet, False, True)
        stir(network.named_parameters())
        with torch.no_grad():
            expected[f"{name}.output"] = unet(**UNET_INPUTS).sample
        for lora in network.unet_loras:
            path = next(w for w in WEIGHTS if lora.lora_name == f"lora_unet_{w.replace('.', '_')}")
            expected[f"{name}.{path}"] = lora.get_merged_weight()[0] if name != "loha" else (
                lora.org_weight + lora.get_weight(lora.shape))  # its get_diff_weight scales twice, its forward once
        save_file(contiguous(network.state_dict()), HERE / "kohya" / f"{name}.safetensors")
    bare = tiny_unet().state_dict()
    expected |= {f"base.{w}": bare[f"{w}.weight"] for w in WEIGHTS}
    save_file(contiguous(expected), HERE / "kohya" / "expected.safetensors")


def _shapes(model):
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            out[name] = [m.out_features, m.in_features]
        elif isinstance(m, nn.Conv2d):
            out[name] = [m.out_channels, m.in_channels, *m.kernel_size]
        elif not list(m.children()):
            out[name] = []
    return out


def diffusers():
    """What diffusers itself saves: the present layout with its configuration in the header, and the older ones."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    (HERE / "diffusers").mkdir(exist_ok=True)
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    expected = {}
    for name, options in {"present": {}, "dora": {"use_dora": True}, "patterns": {
            "rank_pattern": {"conv1": 1}, "alpha_pattern": {"to_q": 9}, "use_rslora": True}}.items():  # fmt: skip
        unet = tiny_unet()
        unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **options))
        stir((n, p) for n, p in unet.named_parameters() if p.requires_grad)
        with torch.no_grad():
            expected[name] = unet(**UNET_INPUTS).sample

        StableDiffusionPipeline.save_lora_weights(
            HERE / "diffusers", unet_lora_layers=get_peft_model_state_dict(unet), weight_name=f"{name}.safetensors",
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())  # fmt: skip
        if name == "present":
            old = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
            scale = 3 / 2
            old = {f"unet.{k}": v * (scale if ".up." in k or "lora_B" in k else 1) for k, v in old.items()}
            save_file(contiguous(old), HERE / "diffusers" / "older.safetensors")
            processors = {k.replace(".to_q.lora.", ".processor.to_q_lora.").replace(".to_out.0.lora.", ".processor.to_out_lora."): v
                          for k, v in old.items() if ".to_q." in k or ".to_out." in k}  # fmt: skip
            save_file(contiguous(processors), HERE / "diffusers" / "processors.safetensors")
            for _, layer in unet.named_modules():
                if hasattr(layer, "scaling") and ("conv1" in _ or "proj_in" in _):
                    layer.scaling["default"] = 0.0
            with torch.no_grad():
                expected["processors"] = unet(**UNET_INPUTS).sample
            expected["older"] = expected["present"].clone()
    save_file(contiguous(expected), HERE / "diffusers" / "expected.safetensors")


def peft():
    """One folder for each case that the installed version of PEFT can make: peft/<version>/<case>."""
    import peft as library

    C, many = library, ["q_proj", "v_proj"]
    cases = {
        "lora": lambda: C.LoraConfig(lora_dropout=0.0, r=2, lora_alpha=3, target_modules=many, modules_to_save=["norm"]),
        "bias": lambda: C.LoraConfig(lora_dropout=0.0, r=2, lora_alpha=3, target_modules=many, bias="lora_only"),
        "kinds": lambda: C.LoraConfig(lora_dropout=0.0, r=2, lora_alpha=3, target_modules=["conv", "table", "fc_in"]),
        "patterns": lambda: C.LoraConfig(lora_dropout=0.0, r=2, lora_alpha=3, target_modules=r".*(q_proj|v_proj|fc_in)", rank_pattern={"q_proj": 3},
                                         alpha_pattern={"fc_in": 5}),
        "rslora": lambda: C.LoraConfig(r=4, lora_alpha=3, target_modules=many, use_rslora=True),
        "dora": lambda: C.LoraConfig(lora_dropout=0.0, r=2, lora_alpha=3, target_modules=many, use_dora=True),
        "adalora": lambda: C.AdaLoraConfig(lora_dropout=0.0, init_r=3, lora_alpha=3, target_modules=many, total_step=10),
        "ia3": lambda: C.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["v_proj"]),
        "loha": lambda: C.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "proj", "conv"]),
        "lokr": lambda: C.LoKrConfig(r=1, alpha=1, target_modules=["q_proj", "fc_in", "conv"]),
        "oft": lambda: C.OFTConfig(r=2, target_modules=many),
        "vera": lambda: C.VeraConfig(r=3, target_modules=many),
        "boft": lambda: C.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
        "ln": lambda: C.LNTuningConfig(target_modules=["norm"]),
        "fourier": lambda: C.FourierFTConfig(n_frequency=20, target_modules=many),
        "hira": lambda: C.HiraConfig(r=2, target_modules=many),
        "randlora": lambda: C.RandLoraConfig(r=2, randlora_alpha=3, target_modules=many),
    }
    here = HERE / "peft" / library.__version__
    for name, config in cases.items():
        try:
            model = library.get_peft_model(Net(), config())
            stir((n, p) for n, p in model.named_parameters() if p.requires_grad)
            y = model.eval()(input_ids=IDS).detach()
            model.save_pretrained(here / name)
            again = library.PeftModel.from_pretrained(Net(), str(here / name)).eval()(input_ids=IDS)
            if not torch.allclose(again, y, atol=1e-5):
                shutil.rmtree(here / name)
                raise ValueError("the library does not read its own file back")
        except Exception as error:
            print(library.__version__, name, type(error).__name__, str(error)[:100])
            continue
        (here / name / "README.md").unlink(missing_ok=True)
        save_file({"y": y}, here / name / "expected.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"lycoris": lycoris, "kohya": kohya, "diffusers": diffusers, "peft": peft}[sys.argv[1]]()
