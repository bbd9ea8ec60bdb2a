"""The verbs: each module holds one typed function that the command line calls."""
