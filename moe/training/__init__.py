"""The layer under autograd: the pipeline's own stages forward, and a stage of its own for each gradient."""
