"""Other libraries: `model.generate` of transformers, and Apple's drafter format."""
