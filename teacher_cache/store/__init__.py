"""The cache on disk and in an object store: what may be named, how it is opened, what is believed of it."""
