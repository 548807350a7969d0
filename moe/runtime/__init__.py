"""Reaches the GPU: launches, tensor maps, caches of compiled code. Knows no stage."""
