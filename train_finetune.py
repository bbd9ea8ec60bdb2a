"""``python train_finetune.py …`` is ``train-clip finetune …``."""

import sys

from train_clip.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
