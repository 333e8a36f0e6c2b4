"""Adapters for frameworks: save and load their live objects. Each module requires its framework."""
