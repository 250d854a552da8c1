"""What a published config says about prompts, read and written: marks around pictures, and the length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmix.core.errors import CheckpointError
from vlmix.core.files import read_json
from vlmix.models.rendering import IMAGE
from vlmix.models.templates import load_template

_START, _END = "<im_start>", "<im_end>"
_MARKED = f"{_START}{IMAGE}{_END}"
_USES_MARKS, _LONGEST, _FIT = "mm_use_im_start_end", "tokenizer_model_max_length", "image_aspect_ratio"
_PROCESSOR, _TEMPLATE = "processor_config.json", "chat_template.jinja"


def published_template(name: str, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The template ``name``, or its source with LLaVA's marks around a picture where the config has them.

    Raises:
        CheckpointError: if the tokenizer does not know the marks, which would then be read letter by letter.

    """
    if not config.get(_USES_MARKS):
        return name
    known = tokenizer.get_vocab()
    if unknown := [mark for mark in (_START, _END) if mark not in known]:
        raise CheckpointError(
            f"config.json says {_USES_MARKS}, but the tokenizer has no {' and no '.join(unknown)}. Give the "
            "tokenizer that was saved with the checkpoint, with --tokenizer DIR, not its decoder's"
        )
    return load_template(name).replace(f"'{IMAGE}'", f"'{_MARKED}'")


def longest(config: Mapping[str, Any]) -> int | None:
    """The longest conversation in tokens, where the config says it.

    Raises:
        CheckpointError: if what it says is no number of tokens.

    """
    found = config.get(_LONGEST)
    if found is not None and (not isinstance(found, int) or found < 1):
        raise CheckpointError(f"config.json: {_LONGEST} {found!r} is no number of tokens")
    return found


def written_prompts(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``config`` with what the processor in ``folder`` knows, where the family says it at all."""
    written = dict(config)
    if not (folder / _PROCESSOR).is_file() or _USES_MARKS not in config:
        return written
    said: Mapping[str, Any] = read_json(folder / _PROCESSOR)
    if written.get(_FIT) == "pad" and said.get("image_processor", {}).get("fit", "pad") != "pad":
        written[_FIT] = "square"
    if said.get("max_length") is not None:
        written[_LONGEST] = said["max_length"]
    template = folder / _TEMPLATE
    written[_USES_MARKS] = template.is_file() and _MARKED in template.read_text(encoding="utf-8")
    return written
