"""Artifacts in a local folder or an object store: written whole or not at all, checked by their hashes."""
