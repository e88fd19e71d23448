"""`python -m backdrop`: the command line."""

from .cli import main

main()
