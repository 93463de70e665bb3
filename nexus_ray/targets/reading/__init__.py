"""Reading a target set: any sequence, by number, checked, from a disk or an object store."""
