"""Planning: what a run will need, by formula and from checkpoint headers, before anything is loaded."""
