"""Checkpoints and tokenizers of other projects, read here."""
