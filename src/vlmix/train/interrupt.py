"""Ctrl-C and SIGTERM as a request: the step in progress is finished and saved; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from vlmix.core.errors import InterruptedRunError


class StopRequest:
    """Within the block, ``signal`` names the signal that asked to stop, or is empty.

    Raises:
        InterruptedRunError: out of the block, where a second signal ended it at once.

    """

    def __init__(self) -> None:
        self.signal = ""
        self._before: dict[signal.Signals, signal.Handlers | signal._HANDLER] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread handle signals; elsewhere they go where they went before.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                f"stopped at once by a second signal after {self.signal}: nothing more was saved, and the "
                "last checkpoint is intact. Continue with --resume"
            ) from None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
