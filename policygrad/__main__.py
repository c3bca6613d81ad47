"""`python -m policygrad` is the command line."""

from policygrad.cli import main

if __name__ == "__main__":  # not in a process of its own environments, which imports this file again
    main()
