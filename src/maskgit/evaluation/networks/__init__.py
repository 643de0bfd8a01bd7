"""Frozen networks that scores look through."""
