"""The HTTP service: an OpenAI-compatible interface to base and student, on Ray Serve."""
