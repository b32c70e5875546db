"""Other people's training loops: transformers' Trainer and all that derive from it (TRL's)."""
