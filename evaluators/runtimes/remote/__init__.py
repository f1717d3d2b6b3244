"""Runtimes on boards, over ssh."""
