"""The stages `fit`, `teacher` and `tune`, and the loop that they share."""
