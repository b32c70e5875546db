"""Plans for whole blocks, one file a family."""
