"""Ways to run an operator that are cheaper than the tree and give the same numbers."""
