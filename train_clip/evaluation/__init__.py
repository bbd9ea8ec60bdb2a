"""Embeddings and scores: plain tensors in, plain numbers out."""
