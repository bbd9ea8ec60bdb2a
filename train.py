"""``python train.py …`` is ``train-clip train …``."""

import sys

from train_clip.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
