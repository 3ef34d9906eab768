"""Text-classification data: one file per source, and how texts become batches."""
