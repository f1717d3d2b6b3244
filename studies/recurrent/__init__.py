"""Recurrent networks that need not update their state at every step of a sequence."""
