"""`python -m inflight.models.gguf FILE FOLDER` makes a folder with the tokenizer of a GGUF file."""
