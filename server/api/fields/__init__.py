"""Request bodies: the wire models and the types of their fields."""
