"""What knows nothing of MaskGIT: checks, files, downloads, devices, shared work; and the version of the package."""

__version__ = "0.1.0"
