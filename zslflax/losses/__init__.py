"""Objectives: arrays in, one loss per pair out, inside a mapped axis; they know nothing of models, data or training.

`contrastive` defines the targets and the cross-entropy of two towers, `classification` the losses of classifiers.
`pairs` finds duplicates in a batch, `sinkhorn` solves optimal transport, and `chunks` bounds memory.
"""
