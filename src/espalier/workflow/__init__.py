"""Experiments: composed, turned into a graph of nodes, and handed to Snakemake."""
