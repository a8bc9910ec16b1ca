"""How long work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

#: Called with how many are finished, how many there are, and what was finished last.
Progress = Callable[[int, int, str], None]
