"""The command line: scripts that turn flags into one config, call one pipeline and print one JSON line."""

from pipelines.process.environment import complete_environment

complete_environment()  # before the libraries that the scripts import
