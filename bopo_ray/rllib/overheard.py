"""What a trial warns of, carried to where a user reads it: Ray shows no process's log but the driver's."""

from __future__ import annotations

import logging

__all__ = ["Overheard"]


class Overheard(logging.Handler):
    """Keeps the warnings of this process until they are taken; they stay in its log as well."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []
        logging.getLogger("bopo_ray").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
        if logging.lastResort and not logging.getLogger().handlers:  # which is asked where there is no handler at all
            logging.lastResort.handle(record)

    def take(self) -> list[str]:
        """The lines since the last time, oldest first."""
        lines, self._lines = self._lines, []
        return lines

    def close(self) -> None:
        logging.getLogger("bopo_ray").removeHandler(self)
        super().close()
