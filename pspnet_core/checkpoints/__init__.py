"""Checkpoint folders, importers of other projects' weights, exports."""
