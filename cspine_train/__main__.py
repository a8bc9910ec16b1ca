"""`python -m cspine_train` is `cspine-train`."""

from cspine_train.cli.commands import main

main(prog_name="cspine-train")
