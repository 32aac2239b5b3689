"""Loads published PyTorch weights (safetensors) into the towers, without PyTorch.

`locate.py` finds the folder, `reading.py` reads its tensors, `layouts.py` knows their published names, `checking.py`
refuses another architecture, and `load.py` does all of it for an image or a text tower.
"""
