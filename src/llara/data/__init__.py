"""Readers and writers: whatever the format, the same records come out, and a bad line is named by file and line."""
