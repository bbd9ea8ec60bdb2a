"""Extension: scores beyond those of one model on all images: several classes an image, subgroups, two models, runs."""
