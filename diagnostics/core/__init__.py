"""What every room uses: errors, tables, files of a run, fingerprints, processes."""
