"""`python -m policygrad` is the command line."""

from policygrad.cli import main

main()
