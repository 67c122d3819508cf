"""`python -m remoe_cli` is the `remoe` command."""

from remoe_cli.cli.app import main

main()
