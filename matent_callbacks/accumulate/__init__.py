"""Statistics of tokens, and how they merge over batches, ranks and split sequences."""
