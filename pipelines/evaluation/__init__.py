"""Scoring a model on labelled data."""
