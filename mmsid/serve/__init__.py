"""One folder in use: bundles of a run, encoding of new ads, and the HTTP service."""
