"""Device work only, without autograd or argument checks. `ops` calls this package, and it calls nothing above it."""
