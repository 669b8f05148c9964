"""Measurements: what the pages beside this file report, each by the command that they name."""
