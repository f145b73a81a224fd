"""The commands, by the panel of `espalier --help` that they stand in; each file adds its own to the app."""
