"""`python -m maskgit` is the command line; torchrun starts it so."""

import sys

from maskgit.apps.cli import main

sys.exit(main())
