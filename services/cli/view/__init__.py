"""The parts of `pagehold top`: what is read, what follows from two readings, and how that is shown."""
