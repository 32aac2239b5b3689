"""The first entries of random seeds, one for each thing that is drawn: different ones give unrelated numbers."""

ORDER_STREAM, AUGMENTATION_STREAM, VIEW_STREAM, REASONS_STREAM = range(4)
