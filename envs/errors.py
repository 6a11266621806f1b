"""The two kinds of failure that everything above distinguishes: the user's mistake, and the machine's.

Always true here: an error pickles, inherits the matching built-in class, and its message is one line that
says what is wrong, the value, what is allowed and how to mend it.
"""

from __future__ import annotations

__all__ = ["ConfigError", "EngineError", "UnknownTaskError"]


class ConfigError(ValueError):
    """The user asked for something that can't be: reported in one line, exit code 2, nothing lost."""


class UnknownTaskError(ConfigError):
    """A task that the environment does not have."""


class EngineError(RuntimeError):
    """The simulator died, hung or answered nonsense. The environment can be reset and starts afresh;
    the episode in progress is lost and is repeated, never scored."""
