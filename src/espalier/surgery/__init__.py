"""The stage `apply`: a checkpoint is rewritten as a plan says, file by file, and proven."""
