"""A layer's weights as a checkpoint has them -> the arguments of the flat call, and what is wrong with weights packed elsewhere."""
