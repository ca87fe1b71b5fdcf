"""Backups: the archives, the directory that they are in, and how one is made, verified and restored."""
