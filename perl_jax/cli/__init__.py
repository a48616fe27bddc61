"""The command line: the only folder that knows gin and flags."""
