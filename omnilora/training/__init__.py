"""Training: configurations, data, models, the loop, checkpoints, evaluation and generation."""
