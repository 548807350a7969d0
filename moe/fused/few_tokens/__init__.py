"""Stages 2 to 5 for few tokens, in two launches."""
