"""The core's verbs, a typed function each, and what a training run is: run.py and run_folder.py."""
