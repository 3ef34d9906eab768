"""Methods that change what the backward pass keeps."""
