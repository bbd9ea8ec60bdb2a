"""``python train_finetune_vpt.py …`` is ``train-clip prompt-tune …``."""

import sys

from train_clip.cli import main

if __name__ == "__main__":
    main(["prompt-tune", *sys.argv[1:]])
