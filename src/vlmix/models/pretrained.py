"""What vlmix's two model classes share with transformers: saving, initial values, gradient checkpointing.

Annotations here are evaluated, not postponed: transformers reads the config class from them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vlmix.core.interfaces import Part
from vlmix.models.configuration import VlmixConfig
from vlmix.models.instruction import keeping_instruction
from vlmix.models.packing import keeping_documents


class VlmixPreTrainedModel(PreTrainedModel):
    """What the two model classes share with transformers."""

    config_class = VlmixConfig
    config: VlmixConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Moved by steps that a 16-bit number cannot take.
    _keep_in_fp32_modules_strict = ["choice_bias"]  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Expert layers ask this model's configuration; transformers looks for a decorator of its own."""
        return True

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """Save with the names the modules have.

        Transformers would otherwise write a loaded model in the names that its own older releases gave to
        models of the decoder's kind, so that loading and saving changes the file.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def _set_gradient_checkpointing(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **rest: Any
    ) -> None:
        """Layers that run once more find what they had before; every way to switch it on comes here."""
        keeping = keeping_documents(keeping_instruction(gradient_checkpointing_func))
        super()._set_gradient_checkpointing(enable, keeping, **rest)

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint gave, then let every part set its special values.

        Not through ``_init_weights``: transformers skips it for modules without parameters of their own.
        """
        super().initialize_weights()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Part):
                    module.reset()
