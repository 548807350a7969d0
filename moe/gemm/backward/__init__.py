"""Gradients of the two grouped GEMMs: five stages, each with a reference in torch."""
