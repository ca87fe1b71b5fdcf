"""The WireGuard peer provisioning service."""
