"""The first Qwen, which transformers has no class of: within its trained length it computes what Qwen2 does.

Its attention keeps three matrices in one, and of the two that read its feed-forward network's input ``w2`` is
the gate. Beyond ``seq_length`` it scales rotations and queries, in evaluation only, which Qwen2 does not; so
that is where the length of the model read here ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vlmix.convert._deepspeed import Network
from vlmix.convert._names import Cut, Names, Rename, Unused
from vlmix.core.errors import CheckpointError

KIND: Final = "qwen2"
LAYER: Final = "transformer.h.{n}."
NETWORK: Final = Network(("w2", "w1"), "c_proj", ours=("gate_proj", "up_proj", "down_proj"))
_OURS = "model.language_model.model."
_OUR_LAYER = f"{_OURS}layers.{{n}}."
_NEEDED = {"rotary_pct": 1.0, "no_bias": True, "emb_dropout_prob": 0.0}
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
    "tie_word_embeddings",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def qwen_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its sizes under Qwen2's names; ``intermediate_size`` counts gate and up together there.

    Raises:
        CheckpointError: if a setting has no counterpart.

    """
    wrong = {key: config.get(key) for key, value in _NEEDED.items() if config.get(key, value) != value}
    if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
        wrong["kv_channels"] = config["kv_channels"]
    if wrong:
        raise CheckpointError(f"config.json: {wrong} has no counterpart in Qwen2, which this Qwen is read as")
    return {
        "model_type": KIND,
        **{key: config[key] for key in _SAME},
        **{key: config[key] for key in _TOKENS if config.get(key) is not None},
        "num_key_value_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"] // 2,
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config["rotary_emb_base"],
        "attention_dropout": config.get("attn_dropout_prob", 0.0),
    }


QWEN = Names(
    (
        *(
            Cut(f"{LAYER}attn.c_attn.{what}", tuple(f"{_OUR_LAYER}self_attn.{m}_proj.{what}" for m in "qkv"))
            for what in ("weight", "bias")
        ),
        Rename(f"{LAYER}attn.c_proj.{{rest}}", f"{_OUR_LAYER}self_attn.o_proj.{{rest}}"),
        Rename(f"{LAYER}ln_1.{{rest}}", f"{_OUR_LAYER}input_layernorm.{{rest}}"),
        Rename(f"{LAYER}ln_2.{{rest}}", f"{_OUR_LAYER}post_attention_layernorm.{{rest}}"),
        Rename(f"{LAYER}mlp.w2.{{rest}}", f"{_OUR_LAYER}mlp.gate_proj.{{rest}}"),
        Rename(f"{LAYER}mlp.w1.{{rest}}", f"{_OUR_LAYER}mlp.up_proj.{{rest}}"),
        Rename(f"{LAYER}mlp.c_proj.{{rest}}", f"{_OUR_LAYER}mlp.down_proj.{{rest}}"),
        Rename("transformer.wte.{rest}", f"{_OURS}embed_tokens.{{rest}}"),
        Rename("transformer.ln_f.{rest}", f"{_OURS}norm.{{rest}}"),
        Rename("lm_head.{rest}", "model.language_model.lm_head.{rest}"),
    ),
    (Unused("transformer.rotary_emb.inv_freq", "computed from the config"),),
)
