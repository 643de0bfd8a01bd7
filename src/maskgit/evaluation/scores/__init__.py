"""From what is kept of images to named numbers."""
