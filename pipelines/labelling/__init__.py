"""Labelling a bucket: plan, execute, record."""
