"""The conformance table: what a training loop may ask of an optimizer, asked of this one and of its rivals."""
