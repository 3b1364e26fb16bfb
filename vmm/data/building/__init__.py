"""A source → shards and a manifest: what vmm data build does."""
