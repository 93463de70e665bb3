"""Which experts matter in each layer, how sure that is, and what chance would give."""
