"""The artifact store on any fsspec URI: publish, fetch, verify, collect garbage."""
