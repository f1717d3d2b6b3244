"""A finished search as people look at it: pictures, a page, a report, comparisons."""
