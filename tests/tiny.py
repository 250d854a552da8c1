"""Small models that tests share: two encoders, any fusion and any decoder."""

from vlmix.core.parts import ENCODERS, PROJECTORS
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DECODERS = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "phi": {},
    "stablelm": {"num_key_value_heads": 4},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {},
}
PLACEHOLDER = 64


def text_config(model_type="llama", **changes):
    return {**_COMMON, **DECODERS[model_type], "model_type": model_type, **changes}


def part(registry, kind):
    return registry.get(kind).settings_class.tiny().model_dump(mode="json")


def config(model_type="llama", fusion=None, **changes):
    return VlmixConfig(
        text_config=text_config(model_type),
        encoders=[part(ENCODERS, "clip"), part(ENCODERS, "convnext")],
        fusion=fusion or {"kind": "patch_mining"},
        projector=part(PROJECTORS, "mlp"),
        image_size=32,
        image_token_id=PLACEHOLDER,
        **changes,
    )


def model(model_type="llama", fusion=None):
    return VlmixForConditionalGeneration(config(model_type, fusion)).eval()


def switch_checkpointing_on(module):
    """By the name transformers has for it: another one since 5.23."""
    new = "activation_checkpointing_enable"
    switch = getattr(module, new if hasattr(module, new) else "gradient_checkpointing_enable")
    switch({"use_reentrant": False})
