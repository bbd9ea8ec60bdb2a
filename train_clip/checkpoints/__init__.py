"""Pretrained weights by their source."""
