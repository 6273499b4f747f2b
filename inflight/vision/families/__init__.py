"""Families of vision models: how an image is written into a prompt, cut and scaled."""
