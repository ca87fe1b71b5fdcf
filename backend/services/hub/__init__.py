"""Keeps wg0.conf and the interface equal to the records."""
