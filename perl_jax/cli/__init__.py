"""The command line: the only folder that uses gin and flags."""
