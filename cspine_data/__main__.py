"""`python -m cspine_data` is `cspine-data`."""

from cspine_data.cli import main

main(prog_name="cspine-data")
