"""What runs will cost before anything runs: FLOPs, bytes, memory, time."""
