"""Shared parts of the command lines: one-line errors, tables, and progress bars on terminals."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cspine_data.errors import CspineDataError, describe_os_error, printable
from cspine_data.extras import install_hint
from cspine_data.progress import Progress

#: Type of arguments and options. Paths are checked where they are used, with a message that names the remedy.
PATH = click.Path(readable=False, path_type=Path)


class CommandGroup(click.Group):
    """A group of commands that prints expected errors in one line, without a traceback, and exits non-zero."""

    #: Errors that a user can fix.
    expected: tuple[type[BaseException], ...] = (CspineDataError, OSError, MemoryError)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; convert expected errors and missing optional dependencies to one-line messages."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except ImportError as error:
            hint = install_hint(error)
            if hint is None:
                raise
            raise click.ClickException(hint) from None
        except self.expected as error:
            raise click.ClickException(printable(_one_line(error))) from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory ran out; free some, or use a machine with more"
    if isinstance(error, OSError) and not isinstance(error, CspineDataError) and error.strerror:
        return describe_os_error(error)
    return " ".join(str(error).split())


@contextmanager
def can_go_on(folder: Path) -> Iterator[None]:
    """Convert Ctrl-C to a message that the same command continues the work."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException(f"{folder}: interrupted; run the same command again to go on") from None


def warn_in_one_line() -> None:
    """Print warnings in one line, without their location in the code."""
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", err=True)


def say(line: str, *, err: bool = False) -> None:
    """Print a line; control characters in file names are replaced."""
    click.echo(printable(line), err=err)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns, without truncating lines."""
    widths = [max([len(name), *(len(row[i]) for row in rows)]) for i, name in enumerate(columns)]
    for row in (columns, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_notes(notes: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Print the notes on each case to stderr, one line per case."""
    for case, of_case in notes:
        if of_case:
            say(f"note: {case}: {'; '.join(of_case)}", err=True)


@contextmanager
def progress_bar(task: str) -> Iterator[Progress | None]:
    """Show a progress bar on a terminal; otherwise yield None and print nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[last]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(task, total=None, last="")

        def advance(finished: int, total: int, last: str) -> None:
            bar.update(shown, completed=finished, total=total, last=last)

        yield advance
