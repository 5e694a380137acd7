"""Models: loaded from any URI, converted from other projects, exported to other engines."""
