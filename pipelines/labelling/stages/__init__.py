"""The walk of a chunk: read, segment, write."""
