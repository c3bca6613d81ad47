"""What the command line does: configuration, training, checkpoints, evaluation, reports."""
