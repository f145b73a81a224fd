"""What is on disk under results/: content-addressed artefacts, their records and origins, and their removal."""
