"""Extension: visual prompts for a frozen CLIP; `prompt-tune`."""
