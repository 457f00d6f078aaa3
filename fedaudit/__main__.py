"""`python -m fedaudit` is the command `fedaudit`."""

from fedaudit.cli import entry

if __name__ == "__main__":
    entry()
