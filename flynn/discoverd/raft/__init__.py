"""Replication of the directory: pysyncobj, with a log on disk that deserves the name and without its fixed pace."""
