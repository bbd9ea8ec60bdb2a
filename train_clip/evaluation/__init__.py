"""Scores and pictures: plain tensors in, plain figures out."""
