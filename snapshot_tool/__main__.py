"""`python -m snapshot_tool`: the same command line as `snap`."""

from snapshot_tool.cli import main

if __name__ == "__main__":
    main()
