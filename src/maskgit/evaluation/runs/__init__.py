"""Evaluations as work that any number of processes share."""
