"""How a shared expert starts: from which routed experts, by which arithmetic, written as an overlay."""
