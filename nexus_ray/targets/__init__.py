"""Training data on disk: packed sequences and, where a loss needs them, the teacher's targets."""
