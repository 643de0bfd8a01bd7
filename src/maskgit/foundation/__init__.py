"""What knows nothing of MaskGIT: checks, files, downloads, devices, shared work."""
