"""Extension: LoRA, small matrices beside the frozen layers of a pretrained model (arXiv 2106.09685)."""
