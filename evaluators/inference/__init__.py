"""The run loop of staged networks; numpy only, copied into bundles."""
