"""Several adapters on one base, each for its own rows of a batch."""
