"""Measurements of drafters and of decoding: acceptance, exactness, step times, draft shapes."""
