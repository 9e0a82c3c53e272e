"""Settings of the measurements, one module per reader, all readable without torch."""
