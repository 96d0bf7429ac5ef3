"""What users start: the command line and the HTTP server."""
