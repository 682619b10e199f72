"""One decoding step, as functions of tensors."""
