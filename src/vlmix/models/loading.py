"""``vlmix.load``: a model and its processor from a model folder or a finished run."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers.utils import logging

from vlmix.core.errors import CheckpointError
from vlmix.core.files import verify_manifest
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor


def model_folder(path: str | Path) -> Path:
    """The model folder that ``path`` is, or that the run folder ``path`` contains.

    Raises:
        CheckpointError: if there is none.

    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder. Give a model folder or a run folder made by `vlmix train`."
        )
    if (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path}: this run has not finished. Continue it with `vlmix train … --out {path} --resume`."
        )
    raise CheckpointError(
        f"{path}: holds neither config.json nor model/config.json, so it is not a model folder."
    )


def load(
    path: str | Path, device: str | torch.device | None = None
) -> tuple[VlmixForConditionalGeneration, VlmixProcessor]:
    """Load a model, ready to answer, and its processor.

    ``path`` is a model folder or a run folder; ``device`` is the accelerator where there is one.

    Raises:
        CheckpointError: if the folder is incomplete, a file was changed, or it is another kind of model.

    """
    folder = model_folder(path)
    if (folder / "manifest.json").is_file():
        verify_manifest(folder)
    config = VlmixConfig.get_config_dict(folder)[0]
    if config.get("model_type") != "vlmix":
        raise CheckpointError(f"{folder}: model_type is {config.get('model_type')!r}, not 'vlmix'.")
    with no_bars():
        model = VlmixForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    processor = VlmixProcessor.from_pretrained(folder, local_files_only=True)
    cast("nn.Module", model).to(device or default_device())  # transformers' own `to` is untyped
    return model.eval(), processor


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def no_bars() -> Generator[None]:
    """Keep transformers from drawing progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
