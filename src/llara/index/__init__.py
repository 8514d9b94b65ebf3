"""Searchable structures: what an index folder holds (base), its kinds (flat, sparse, bm25), and building (build)."""
