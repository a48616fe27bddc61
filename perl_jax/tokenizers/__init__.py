"""Tokenizers of whatever kind as SeqIO vocabularies."""
