"""Calibration: its tokens, and the statistics that forward passes over them leave."""
