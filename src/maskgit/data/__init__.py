"""Images and tokens on disk: what evaluation and training read, through one door."""
