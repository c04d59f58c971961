"""Training, evaluation and everything the command line runs."""
