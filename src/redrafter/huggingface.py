"""The name by which `custom_generate/generate.py` of drafter folders from version 0.1 calls this package."""

from redrafter.integrations.transformers import custom_generate, from_folder

__all__ = ["custom_generate", "from_folder"]
