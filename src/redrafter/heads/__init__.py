"""Draft heads: `nn.Module`s, their configs and their folders.  Nothing here knows about decoding."""
