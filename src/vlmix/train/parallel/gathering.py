"""A divided model as an ordinary transformers folder, gathered tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlmix.core.files import verify_manifest, write_json, write_manifest
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.publishing import publish_together
from vlmix.train.parallel.sharding import whole_tensors

_FILE_BYTES = 4 * 10**9


def gather_model(
    model: VlmixForConditionalGeneration,
    processor: VlmixProcessor,
    folder: Path,
    processes: Processes,
    schema: str,
) -> None:
    """Write ``folder``; no process ever holds more than one file's tensors beside its own share.

    Raises:
        DiskFullError: if there is no room.

    """

    def fill(new: Path) -> Iterator[Path]:
        yield from _write_files(new, unique_tensors(model), processes)

    def finish(new: Path) -> None:
        config = model.config
        config.architectures, config.dtype = [VlmixForConditionalGeneration.__name__], "float32"
        config.save_pretrained(new)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(new)
        processor.save_pretrained(new)
        write_manifest(new, schema)

    publish_together(folder, processes, fill, finish)
    if processes.is_main:
        verify_manifest(folder, schema)
    processes.barrier()


def _write_files(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> Iterator[Path]:
    """Files of about ``_FILE_BYTES`` with their index, or one, written by the first process.

    What fails there is raised at the end: until then the others wait for it to gather with them.
    """
    files: list[list[str]] = []
    problems: list[Exception] = []
    waiting: dict[str, Tensor] = {}
    waiting_bytes = total_bytes = 0
    for name, tensor in whole_tensors(tensors):
        size = tensor.numel() * tensor.element_size()
        if waiting_bytes and waiting_bytes + size > _FILE_BYTES:
            files.append(_flush(folder / str(len(files)), waiting, processes, problems))
            waiting_bytes = 0
        waiting[name] = tensor.cpu().contiguous() if processes.is_main else tensor.new_empty(0)
        waiting_bytes, total_bytes = waiting_bytes + size, total_bytes + size
    files.append(_flush(folder / str(len(files)), waiting, processes, problems))
    if problems:
        raise problems[0]
    if not processes.is_main:
        return
    names = [_file_name(number, len(files)) for number in range(len(files))]
    for number, name in enumerate(names):
        (folder / str(number)).rename(folder / name)
        yield folder / name
    if len(files) > 1:
        placed = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        metadata = {"total_size": total_bytes}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": placed})


def _flush(
    path: Path, waiting: dict[str, Tensor], processes: Processes, problems: list[Exception]
) -> list[str]:
    names = list(waiting)
    if processes.is_main and not problems:
        try:
            save_file(waiting, path, {"format": "pt"})
        except Exception as error:  # noqa: BLE001 - raised when nobody waits any more
            problems.append(error)
    waiting.clear()
    return names


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
