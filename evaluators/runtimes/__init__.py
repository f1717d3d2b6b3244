"""The libraries that run artifacts, one module each."""
