"""Extension: what a trained model's features are worth, and what its similarities mean: heads, classes, calibration."""
