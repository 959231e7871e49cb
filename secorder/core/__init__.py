"""The documented functions."""
