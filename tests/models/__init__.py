"""Models: every architecture and the default model, against transformers. Needs torch and the test extra."""
