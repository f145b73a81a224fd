"""The stage `score`: tasks, perplexities, and the parameters that a token uses."""
