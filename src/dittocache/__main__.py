"""`python -m dittocache COMMAND`, the same as `dittocache COMMAND`."""

from dittocache.cli.app import main

if __name__ == "__main__":
    main()
