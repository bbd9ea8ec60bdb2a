"""Extension: visual prompts beside a frozen CLIP; `prompt-tune`."""
