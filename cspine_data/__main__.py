"""`python -m cspine_data` is `cspine-data`."""

from cspine_data.cli.commands import main

main(prog_name="cspine-data")
