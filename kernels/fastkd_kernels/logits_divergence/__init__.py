"""Divergence of the logits of two models."""
