"""Data: one file per source of labeled texts, and how texts become batches; `language` for decoders."""
