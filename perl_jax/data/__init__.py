"""From a SeqIO task to batches."""
