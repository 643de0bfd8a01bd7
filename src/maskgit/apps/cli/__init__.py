"""The command line."""

from maskgit.apps.cli.commands import main

__all__ = ["main"]
