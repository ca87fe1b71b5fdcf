"""Measurements of the whole, as commands. `make bench` runs them; the tests never do."""
