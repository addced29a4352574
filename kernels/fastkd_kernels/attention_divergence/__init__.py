"""Divergences of attention probabilities and of relations."""
