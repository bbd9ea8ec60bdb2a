"""Pretrained encoders of other libraries, by name."""
