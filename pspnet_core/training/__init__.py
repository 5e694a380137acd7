"""Augmentation, losses, optimisers, norms, averaged weights."""
