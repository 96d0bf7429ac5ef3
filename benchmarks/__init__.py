"""What is measured, and with what: scripts, and the tools behind `loraplex bench`."""
