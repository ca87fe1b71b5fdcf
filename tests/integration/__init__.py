"""The service and its real parts: interfaces, databases, sockets and processes."""
