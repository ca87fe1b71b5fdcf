"""The WireGuard peer provisioning service."""

__version__ = "0.1.0"
