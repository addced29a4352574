"""Losses on hidden states and embeddings."""
