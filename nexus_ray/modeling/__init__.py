"""The model: shared experts, packed experts, loading a base with or without an overlay."""
