"""The run loop of staged networks; numpy alone, and copied into bundles."""
