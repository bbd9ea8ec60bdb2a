"""Visual prompts beside a frozen CLIP: an extension, which the core does not know."""
