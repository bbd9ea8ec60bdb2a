"""The core's commands, one typed function each, and training runs: run.py and run_folder.py."""
