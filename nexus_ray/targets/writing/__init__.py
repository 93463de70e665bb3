"""Making a target set: packed text, what the teacher says about it, shards, the commit."""
