"""Image files, masks, classes and statistics of masks."""
