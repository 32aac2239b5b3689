"""Objectives: arrays in, one loss per pair out, inside a mapped axis; they know nothing of models, data or training.

`contrastive` defines the targets and the cross-entropy; `sinkhorn` solves optimal transport; `chunks` bounds memory.
"""
