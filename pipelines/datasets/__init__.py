"""Labelled data: layouts, reading and checking pairs, packed shards."""
