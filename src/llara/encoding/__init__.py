"""A corpus as vectors on disk: the document store, the vectors folder, and the job that fills both."""
