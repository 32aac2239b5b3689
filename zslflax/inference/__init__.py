"""Uses a trained model: `predictor.py` embeds, classifies and searches images.

`restore.py` loads the model of a run, an export or a published CLIP or SigLIP, `classifier.py` is the predictor of a
classifier, `export.py` defines the exported folder, `class_embeddings.py` turns class names and prompts into embeddings
(cached by `class_cache.py`), and `top_k.py` finds the best classes. `clip_benchmark.py` gives models the form that
CLIP_benchmark takes.
"""
