"""`python -m snapshot_tool`: the same command line as `snap`."""

from snapshot_tool.cli import program

if __name__ == "__main__":
    program()
