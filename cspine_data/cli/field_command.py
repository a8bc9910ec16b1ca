"""A command whose options are made from typed fields."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import click
import cloup


class FieldCommand(click.Command):
    """A command whose options are made from typed fields only when it is used, so that a list of commands appears fast.

    Parameters
    ----------
    fields : tuple of str
        The fields of `PrepareOptions`. ``selection`` stands for all fields of `Selection`, and ``labels`` for those of
        `LabelOptions`. Empty for all options of `prepare`.
    """

    def __init__(self, callback: Callable[..., Any], fields: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(callback=callback, **attributes)
        self._function = callback
        self._fields = fields

    @cached_property
    def complete(self) -> click.Command:
        """The command with all its options."""
        from cspine_data.cli.options import field_options, prepare_options

        decorate = field_options(*self._fields) if self._fields else prepare_options
        return cloup.command(self.name, params=list(self.params), help=self.help)(decorate(self._function))

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse the arguments of the command with all its options."""
        return self.complete.make_context(*args, **more)
