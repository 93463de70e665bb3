"""The exported model as a transformers architecture, `nexus_gpt_oss`."""
