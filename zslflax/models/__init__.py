"""Flax linen modules of the image and text towers, and of the two-tower model that joins them.

`build.py` maps names in a config to modules, `import_weights/` loads published weights into them, and
`partition.py` separates trained parameters from frozen ones.
"""
