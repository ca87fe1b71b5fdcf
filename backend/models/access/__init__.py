"""Callers, credentials, proofs of identity, and rows of the audit log."""
