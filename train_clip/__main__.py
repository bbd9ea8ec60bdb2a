"""``python -m train_clip``: the train-clip command, where its script is not on the path."""

from train_clip.cli import main

if __name__ == "__main__":
    main()
