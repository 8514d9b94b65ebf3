"""Searchable structures: what an index folder holds (base), the kinds of index (flat, bm25), and building (build)."""
