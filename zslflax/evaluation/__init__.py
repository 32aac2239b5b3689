"""Measures models on test sets: zero_shot.py evaluates a run, metrics.py and its neighbours have one metric each.

test_sets.py, label_space.py and wordnet.py say what a test set consists of, embedding.py embeds it. results.py
names what was measured. few_shot.py and caption_noise.py answer other questions about a model or its data.
"""
