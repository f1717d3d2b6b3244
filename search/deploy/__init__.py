"""From a version that was picked to a bundle: confirm, write, measure."""
