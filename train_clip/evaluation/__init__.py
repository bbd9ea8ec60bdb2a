"""Embeddings and scores: plain tensors in, plain figures out."""
