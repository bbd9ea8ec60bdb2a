"""What is to be known of pairs before they are trained on: facts of each, kept on disk, and figures of all."""
