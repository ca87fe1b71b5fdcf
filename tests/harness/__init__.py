"""What the tests stand on: hosts with real WireGuard, the service as a process, PostgreSQL."""
