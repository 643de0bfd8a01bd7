"""Images: untrusted files, arrays, sheets; the only owner of ranges, sizes and file formats."""

from maskgit.images.arrays import *  # noqa: F403
