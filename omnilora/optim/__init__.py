"""Optimizers that a method owns."""
