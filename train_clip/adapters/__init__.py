"""Extension: dual encoders of the transformers library, such as SigLIP 2, trained and used like a CLIP."""
