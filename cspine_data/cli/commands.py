"""The `cspine-data` command: each command calls one public function and prints what it returns."""

from __future__ import annotations

import click

from cspine_data.cli.source_commands import phantom, prepare, relabel, scan
from cspine_data.cli.store_commands import export, gc, info, remove, report, verify
from cspine_data.terminal import CommandGroup, warn_in_one_line


@click.group(cls=CommandGroup, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cspine")
def main() -> None:
    """Correct the bias field of spine MRI once, and store volumes and slices for training."""
    warn_in_one_line()


for command in (phantom, scan, relabel, prepare, info, report, verify, remove, gc, export):
    main.add_command(command)
