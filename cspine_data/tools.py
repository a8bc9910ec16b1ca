"""Helpers for programs built on `cspine_data`: parallel tasks, extension points, atomic files, locks and pages.

`cspine_train` uses them for run and study folders. They need neither NumPy nor Dask at import.
"""

from __future__ import annotations

from cspine_data.errors import count, describe_problem, meant, some_of
from cspine_data.extensions import ExtensionPoint
from cspine_data.extras import install_hint
from cspine_data.files import atomic_write, exclusive_lock, make_folder, remove_unfinished
from cspine_data.pages.page import render_page
from cspine_data.parallel.workers import Workers, side_by_side, usable_cores

__all__ = [
    "ExtensionPoint",
    "Workers",
    "atomic_write",
    "count",
    "describe_problem",
    "exclusive_lock",
    "install_hint",
    "make_folder",
    "meant",
    "remove_unfinished",
    "render_page",
    "side_by_side",
    "some_of",
    "usable_cores",
]
