"""The two networks, their configs, and the vocabulary between them."""
