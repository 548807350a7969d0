"""Callables that stand for neighbouring stages of the pipeline."""
