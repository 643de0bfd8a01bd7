"""`python -m maskgit` is the command line; torchrun starts it so."""

import sys

from maskgit.apps.cli.commands import main

sys.exit(main())
