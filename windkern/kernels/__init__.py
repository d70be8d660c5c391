"""Device work only: no autograd, no argument checks. `ops` calls this package; it calls nothing above it."""
