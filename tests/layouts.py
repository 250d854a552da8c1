"""Tiny folders in published layouts, made from transformers' and timm's own models with random weights."""

import json

import torch
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIDE, AUX_SIDE, WIDTH = 16, 32, 32
WIDTHS = (4, 6, 8, 10)
CHANNELS = 16
KINDS = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 3},
    "gemma": {"head_dim": 8},
    "qwen2": {},
    "phi": {},
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_FLAT = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": CHANNELS,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
}
_MGM = {
    "image_size_aux": AUX_SIDE,
    "image_grid": 1,
    "image_global": False,
    "mm_vision_tower_aux": "openclip-convnext",
    "mm_hidden_size_aux": sum(WIDTHS),
    "optimize_vision_tower": False,
}


def decoder(kind):
    """Transformers' own decoder of this kind."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind]})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # so large that kinds of GELU differ
                weight.mul_(6)
    return model


def clip():
    torch.manual_seed(1)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=CHANNELS,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=SIDE,
            patch_size=8,
        )
    )


def convnext():
    torch.manual_seed(2)
    return ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=WIDTHS, ls_init_value=1.0)


def plain_decoder(model, folder):
    """The decoder's own folder, as transformers writes it: Mixtral's experts one by one."""
    model.save_pretrained(folder)
    return folder


def language(model, folder):
    """Tensors by the names that every version of transformers had, and an old flat config."""
    tensors = load_file(plain_decoder(model, folder) / "model.safetensors")
    config = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    rope = config.pop("rope_parameters")
    keys = ("rope_theta", "partial_rotary_factor")
    return tensors, {**config, **{key: rope[key] for key in keys if key in rope}, "rope_scaling": None}


def projector(inputs=CHANNELS):
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return {f"model.mm_projector.{name}": value for name, value in layers.state_dict().items()}


def clip_tensors(prefix="model.vision_tower.vision_tower.vision_model."):
    return {f"{prefix}{name}": value.clone() for name, value in clip().state_dict().items()}


def mining():
    torch.manual_seed(4)
    inputs = {"query": CHANNELS, "aux": sum(WIDTHS), "val": sum(WIDTHS)}
    return {
        f"model.vlm_uni_{name}_projector.{key}": value
        for name, channels in inputs.items()
        for key, value in nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, CHANNELS))
        .state_dict()
        .items()
    }


def aux_tensors():
    return {
        f"model.vision_tower_aux.vision_{name}": value.clone()
        for name, value in convnext().state_dict().items()
        if name.startswith(("stem.", "stages."))
    }


def written(folder, tensors, config, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llava(kind, folder, scratch, model=None):
    """As LLaVA's own classes write it, with CLIP inside."""
    tensors, config = language(model or decoder(kind), scratch / f"decoder-{kind}")
    names = {"architectures": [f"Llava{kind.capitalize()}ForCausalLM"], "model_type": f"llava_{kind}"}
    return written(folder, {**tensors, **projector(), **clip_tensors()}, {**config, **_FLAT, **names})


def mini_gemini(kind, folder, scratch, model=None, generation="MGM"):
    """As either generation of Mini-Gemini's own classes writes it, with both encoders inside."""
    tensors, config = language(model or decoder(kind), scratch / f"decoder-{kind}")
    config |= {**_FLAT, **_MGM, "architectures": [f"{generation}{kind.capitalize()}ForCausalLM"]}
    config |= {"model_type": "mgm" if kind == "llama" else f"mgm_{kind}"}
    if generation == "MiniGemini":
        del config["model_type"]  # as on the hub
        config |= {"aux_img_fold": False, "aux_with_fpn": False, "max_length": 4096}
    if kind == "gemma":
        config |= {"hidden_act": "gelu"}
    parts = {**tensors, **projector(), **clip_tensors(), **aux_tensors(), **mining()}
    return written(folder, parts, config)
