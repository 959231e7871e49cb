"""Hessian diagonals per layer: facts about each layer, the strategy that they allow, its values."""
