"""Artifacts in a local folder or an object store: written whole or not at all, checked by their hashes.

store     artifacts by reference: published, fetched, repaired
ref       references: kind, name and key
folders   folders that are visible whole or not at all
objects   the same in an object store
remote    requests to object stores, repeated where they fail
manifest  an artifact's manifest, and checks of its files
partial   saved states and failures of cells that are not done
drivers   the grids that are running
catalog   artifacts listed and found by key or name
verify    ctp store verify
garbage   ctp store gc and rm
"""
