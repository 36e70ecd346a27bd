"""Training: first weights, losses of the stages, data, the loop, and one process or many."""
