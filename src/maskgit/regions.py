"""Pixel boxes and masks as token masks, and compositing: the face of `maskgit.editing.regions`."""

from maskgit.editing.regions import *  # noqa: F403
