"""Modelling code that is shipped in the checkpoints that Espalier writes; imports nothing of Espalier there."""
