"""The machine at hand, and those that costs are computed for: memory, speed, disk."""
