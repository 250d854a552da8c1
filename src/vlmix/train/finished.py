"""A trained model as an ordinary transformers folder with its processor."""

from __future__ import annotations

from pathlib import Path

from vlmix.core.files import publish, verify_manifest, write_manifest
from vlmix.models.loading import no_bars
from vlmix.train.build import Setup
from vlmix.train.parallel.gathering import gather_model
from vlmix.train.parallel.processes import Processes

MODEL_SCHEMA = "vlmix.model/1"


def publish_model(setup: Setup, folder: Path, processes: Processes | None = None) -> Path:
    """Write the model as it is now, in eval mode, and check what was written; all processes must ask.

    Raises:
        DiskFullError: if there is no room.

    """
    setup.model.eval()
    if processes is not None and processes.world > 1:
        gather_model(setup.model, setup.processor, folder, processes, MODEL_SCHEMA)
        return folder
    with publish(folder) as new, no_bars():
        setup.model.save_pretrained(new)
        setup.processor.save_pretrained(new)
        write_manifest(new, MODEL_SCHEMA)
    verify_manifest(folder, MODEL_SCHEMA)
    return folder
