"""Annotation files: their rows, their formats, the samples in them, and dialogues to learn from."""
