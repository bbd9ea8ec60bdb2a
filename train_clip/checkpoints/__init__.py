"""Files of weights: find, identify, read them without running code, build the model, and write other formats."""
