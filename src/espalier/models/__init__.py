"""Models that run: loaded whole or layer by layer, changed in memory, and observed."""
