"""Answering with a loaded model, base or student: chat generation and perplexity of given texts."""
