"""The label table: its schema, the plans that fence it, and how it is read."""
