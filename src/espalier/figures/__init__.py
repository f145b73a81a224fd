"""The figures of a report: one file a kind, each from documents and plans to a matplotlib figure; imports no torch."""
