"""Starts that read the weight or data: what a method's ``store``, ``prepare`` and ``fill`` compute."""
