"""Pictures that are no files of their own. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import IO


class StoredPicture(ABC):
    """An encoded picture inside something larger: a member of a tar, a cell of a table.

    It says where the bytes are and holds none, so it goes to another process as it is.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @abstractmethod
    def open(self) -> IO[bytes]:
        """The encoded bytes, from their beginning; whoever asks closes it.

        Raises:
            ImageError: if they are missing or too many.

        """
