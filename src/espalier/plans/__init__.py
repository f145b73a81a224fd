"""Plans: which operation is done to each layer, and the operations."""
