"""Losses of other libraries, exchanged for ours; each module imports its host when installed."""
