"""Evaluation: base and student side by side on held-out text, and the report about it."""
