"""What the command line does for language models: tasks, training, evaluation, reward models."""
