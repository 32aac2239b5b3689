"""Objectives. `contrastive` makes the targets and the one cross-entropy; `sinkhorn` solves optimal transport.

They map arrays to per-pair values inside a mapped axis and know nothing of models, data or training.
"""
