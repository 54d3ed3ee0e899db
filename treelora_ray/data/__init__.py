"""Task streams: what is learnt, in which order, in which batches."""
