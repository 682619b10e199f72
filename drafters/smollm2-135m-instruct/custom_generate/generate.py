"""For model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)."""

from redrafter.integrations.transformers import from_folder as generate  # noqa: F401
