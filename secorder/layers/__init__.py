"""Layers: which a model has, where their samples lie, their per-sample gradients and the contraction of these."""
