"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

#: Called with the number of finished items, the total, and the name of the last one.
Progress = Callable[[int, int, str], None]
