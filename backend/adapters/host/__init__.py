"""What the host gives: programs, files and locks."""
