"""A report as JSON and as a page."""
