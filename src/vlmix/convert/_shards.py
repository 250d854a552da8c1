"""Writing tensors one by one into shards with an index, never holding more than a shard."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vlmix.core.files import write_json

SHARD_BYTES = 4 << 30


class ShardWriter:
    """Collects tensors and writes a shard whenever the next would make it larger than ``SHARD_BYTES``."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder, self.stem = folder, stem
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def make_room(self, size: int) -> None:
        """Write what is held if ``size`` more bytes would exceed a shard; call it before reading them."""
        if self._held and self._bytes + size > SHARD_BYTES:
            self._flush()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        size = tensor.numel() * tensor.element_size()
        self.make_room(size)
        self._held[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def close(self, *, index: bool = False) -> None:
        """Write what is left, name the shards, and write an index: if there are several, or ``index``."""
        self._flush()
        count = len(self._shards)
        names = [
            f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{i:05d}-of-{count:05d}.safetensors"
            for i in range(1, count + 1)
        ]
        for part, name in enumerate(names):
            self._part(part).rename(self.folder / name)
        if count > 1 or index:
            weight_map = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            written = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", written)

    def _flush(self) -> None:
        if self._held:
            save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._held))
        self._held, self._bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.folder / f"{self.stem}.part{index}"
