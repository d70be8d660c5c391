"""What a run reports: records, lines, tables, pictures, the model card."""
