"""Other libraries: `generate` of transformers, and the drafter format of Apple."""
