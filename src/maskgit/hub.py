"""The face of `maskgit.checkpoints`."""

from maskgit.checkpoints.folder import *  # noqa: F403
