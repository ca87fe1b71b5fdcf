"""Keys and the shapes of provisioning."""
