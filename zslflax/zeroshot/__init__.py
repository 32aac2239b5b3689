"""Zero-shot evaluation: names to class embeddings, and what is measured with them."""
