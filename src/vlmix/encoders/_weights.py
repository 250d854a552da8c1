"""Published weights -> an encoder's tower, strictly: every tensor is used, or known to be of no use here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from vlmix.core.errors import CheckpointError
from vlmix.core.pickles import as_safetensors

_TEXT_SIDE = (r"(text_model|text_projection|visual_projection)\b", r"logit_(scale|bias)$")
_POSITION_IDS = (r".*position_ids$",)
_BLOCK = re.compile(r"(?:(?:encoder|model)\.)?layers?\.(\d+)\.")


def load_tower(tower: PreTrainedModel, source: str, *, layers: int, unused: Sequence[str] = ()) -> None:
    """Load a transformers vision tower from a hub id or folder of safetensors.

    ``layers`` counts the published blocks; those behind the tower's last one are expected and left out, as
    are a text side and names that match a pattern in ``unused``.

    Raises:
        CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

    """
    cls, blocks = type(tower), tower.config.num_hidden_layers
    _check_config(tower, source, layers)
    with _quiet(), _readable(source):
        result: Any = cls.from_pretrained(
            source,
            config=type(tower.config).from_dict(tower.config.to_dict()),
            dtype=tower.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    loaded, info = result
    explained = _explainer((*_TEXT_SIDE, *_POSITION_IDS, *unused))
    wanted = set(tower.state_dict())
    left_over = {key for key in _plain(info["unexpected_keys"]) if not _behind(key, blocks)}
    _refuse(
        source,
        missing=wanted & {*info["missing_keys"]},
        left_over=(key for key in left_over if not explained(key)),
        misshaped=(
            f"{key} {tuple(theirs)}, here {tuple(ours)}" for key, theirs, ours in info["mismatched_keys"]
        ),
    )
    tower.load_state_dict({key: value for key, value in loaded.state_dict().items() if key in wanted})


def load_safetensors(
    module: nn.Module,
    source: str,
    *,
    files: Sequence[str],
    rename: Callable[[str], str],
    unused: Sequence[str] = (),
) -> None:
    """Load a module from the first of ``files`` that a folder or hub repository has, or from a file.

    ``rename`` turns a stored name into ours; names that match a pattern in ``unused`` stay behind. Any file
    but safetensors is a pickle, and read as ``vlmix.core.pickles`` says.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape, or a pickle holds anything but
            tensors.

    """
    path, ours, explained = _find(source, files), module.state_dict(), _explainer(unused)
    with _readable(source), _opened(path) as parts:
        names = {rename(name): (part, name) for part in parts for name in part.keys()}  # noqa: SIM118
        shapes = {key: tuple(part.get_slice(name).get_shape()) for key, (part, name) in names.items()}
        _refuse(
            source,
            missing=ours.keys() - names.keys(),
            left_over=(key for key in names.keys() - ours.keys() if not explained(key)),
            misshaped=(
                f"{key} {shapes[key]}, here {tuple(ours[key].shape)}"
                for key in ours.keys() & names.keys()
                if shapes[key] != tuple(ours[key].shape)
            ),
        )
        found = {key: names[key] for key in ours}
        module.load_state_dict({key: part.get_tensor(name) for key, (part, name) in found.items()})


@contextmanager
def _opened(path: Path) -> Iterator[list[Any]]:
    """The file's readers: itself, or the parts of its copy if it is a pickle."""
    with ExitStack() as stack:
        parts = [path]
        if path.suffix != ".safetensors":
            parts = as_safetensors(path, Path(stack.enter_context(TemporaryDirectory())))
        yield [stack.enter_context(safe_open(part, framework="pt")) for part in parts]


def _check_config(tower: PreTrainedModel, source: str, layers: int) -> None:
    """Compare what tensor shapes cannot show: heads, activation, norm constants, depth."""
    cls, ours = type(tower.config), tower.config.to_dict()
    with _quiet(), _readable(source):
        raw, _ = cls.get_config_dict(source)
        raw = raw.get(cls.base_config_key, raw) if cls.base_config_key else raw
        theirs = cls.from_dict(raw).to_dict()
    theirs["model_type"] = raw.get("model_type", cls.model_type)
    compared = {key: (value, theirs[key]) for key, value in ours.items() if key in _COMPARED}
    compared["num_hidden_layers"] = (layers, theirs["num_hidden_layers"])
    wrong = [f"{key} is {b!r}, here {a!r}" for key, (a, b) in compared.items() if a != b]
    if wrong:
        raise CheckpointError(f"{source}: other sizes than the encoder's settings: {'; '.join(wrong)}")


_COMPARED = frozenset(
    (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "mlp_ratio",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "num_register_tokens",
        "use_swiglu_ffn",
        "qkv_bias",
    )
)


def _refuse(
    source: str, *, missing: Iterable[str], left_over: Iterable[str], misshaped: Iterable[str]
) -> None:
    named = {"missing": missing, "left over": left_over, "of another shape": misshaped}
    lines = [
        f"{len(names)} {what}: {_first(names)}" for what, found in named.items() if (names := sorted(found))
    ]
    if lines:
        raise CheckpointError(
            f"{source}: the tensors do not fit this encoder's settings. {'. '.join(lines)}. "
            "Give the settings the checkpoint was made with."
        )


def _first(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (" …" if len(names) > shown else "")


def _explainer(patterns: Sequence[str]) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda key: any(pattern.match(key) for pattern in compiled)


def _plain(keys: Iterable[str]) -> set[str]:
    """Names as the bare tower has them, whatever model it was stored in."""
    return {key.removeprefix("vision_model.") for key in keys}


def _behind(key: str, blocks: int) -> bool:
    found = _BLOCK.match(key)
    return found is not None and int(found.group(1)) >= blocks


def _find(source: str, files: Sequence[str]) -> Path:
    folder = Path(source)
    if folder.is_file():
        return folder
    if folder.is_dir():
        for name in files:
            if (folder / name).is_file():
                return folder / name
        raise CheckpointError(f"{source}: the folder holds none of {', '.join(files)}")
    for name in files[:-1]:
        try:
            return Path(hf_hub_download(source, name))
        except (OSError, HFValidationError):
            continue
    with _readable(source):
        return Path(hf_hub_download(source, files[-1]))


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn what a reader raises about an unreadable source into our own error."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{source}: cannot be read as published weights in safetensors: {error} "
            "Give a folder that holds them, or a hub id this machine can reach."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own report of unused tensors: ours is stricter and is raised, not logged."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
