"""From rows on disk to the batches of a run: rows, conversations, tokens, pairs."""
