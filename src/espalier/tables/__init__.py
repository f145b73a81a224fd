"""The stage `table`: scores as tidy rows with intervals, beside published numbers, in every rendering."""
