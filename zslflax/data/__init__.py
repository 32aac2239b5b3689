"""From files to batches: `sources` give records, `preprocess` turns them into arrays, and `pipeline` makes batches.

`images` decodes, `crops` resizes, and `text` tokenizes; `storage` reads files, local and remote; `packing` packs
several captions into a row; `text_features` and `image_features` keep what frozen towers compute. A batch is a function
of the seed and the step alone.
"""
