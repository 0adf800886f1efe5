"""`python -m transfer_cli` is `transfer`."""

from transfer_cli.cli import main

if __name__ == "__main__":
    main()
