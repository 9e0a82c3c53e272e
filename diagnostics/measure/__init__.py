"""Functions of logits alone: divergences, losses and the projection onto the vocabulary."""
