"""What embeddings say, as the LM head reads them: terms, what two share, and how far the view can be trusted."""
