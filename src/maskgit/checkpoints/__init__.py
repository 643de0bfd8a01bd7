"""Models in files: folders, the registry, Google's format."""
