"""Data sources: one module for each format, and `opening` to open a source by its specification.

Each source implements `base.Source`: random access to records of an image, captions, labels and a name. Tar shards are
read by `webdataset`, with the help of `shard_patterns`, `tar_index` and `tar_format`; `folders` opens a folder as what
it holds.
"""
