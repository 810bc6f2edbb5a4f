"""Training and testing with Lightning: the recognizer, its recipe, and callbacks."""
