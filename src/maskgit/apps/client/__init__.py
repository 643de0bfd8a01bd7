"""A Python client of the server."""

from maskgit.apps.client.client import *  # noqa: F403
