"""Hugging Face checkpoint directories: reading, writing, their number types and sizes."""
