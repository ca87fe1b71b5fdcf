"""What is parsed once at the edge and typed from then on."""
