"""How a teacher's distributions become bytes, a fixed number a position, and distributions again."""
