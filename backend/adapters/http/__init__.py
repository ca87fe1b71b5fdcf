"""What the HTTP server needs beyond uvicorn."""
