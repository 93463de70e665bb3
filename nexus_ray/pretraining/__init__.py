"""Pretraining a small GPT-OSS-architecture MoE from scratch: how the embedded model was made."""
