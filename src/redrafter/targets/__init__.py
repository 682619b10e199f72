"""Any causal language model of transformers, unmodified, as a verifier of draft trees."""
