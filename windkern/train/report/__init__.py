"""Report a run: records, lines, tables, pictures and the model card."""
