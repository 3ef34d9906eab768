"""Data: one file per source of labelled texts, and how texts become batches; `language` for decoders."""
