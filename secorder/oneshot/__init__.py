"""Measurements by passes of our own, on a model that is isolated for as long as they take."""
