"""`python -m specjax`, where the `specjax` command is not on the path."""

from specjax.cli import entry

if __name__ == "__main__":
    entry()
