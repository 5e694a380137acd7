"""The command line: scripts that turn flags into one config, call one pipeline and print one JSON line."""
