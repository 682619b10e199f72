"""Old module name that `custom_generate/generate.py` in drafter folders of version 0.1 imports."""

from redrafter.integrations.transformers import custom_generate, from_folder

__all__ = ["custom_generate", "from_folder"]
