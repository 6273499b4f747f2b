"""Vision towers: from prepared pixels to rows in the language model's space."""
