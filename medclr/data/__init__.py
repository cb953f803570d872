"""From the manifest to batches: the table of scans, the slice store, the loader, and a seeded phantom cohort."""
