"""The exported model: its transformers architecture `nexus_gpt_oss`, writing it, and the proof that it is whole."""
