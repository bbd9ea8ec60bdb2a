"""Files of weights: found, told apart, read without running them, built into a model, and written for others."""
