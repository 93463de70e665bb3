"""Looking into a target set: what it holds, what it takes, and a sequence in words."""
