"""What trials leave, and the front that they make."""
